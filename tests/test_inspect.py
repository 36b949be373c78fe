"""bridge.inspect: what it prints and writes, and its page in a real browser."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge import inspect
from tests.data import chat_tokenizer
from tests.test_sweep_report import dom, needs_browser

SCRIPT = "</pre><script>document.title='owned'</script>"


def _run(tmp_path: Path, monkeypatch: Any, *given: str) -> int:
    tokenizer = chat_tokenizer.save(tmp_path / "tokenizer")
    talk = [{"role": "user", "content": SCRIPT}, {"role": "assistant", "content": "Paris.", "weight": 0.5}]
    (tmp_path / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    keys = [f"data.path={tmp_path}/talk.jsonl", f"data.tokenizer={tokenizer}", f"data.cache_dir={tmp_path}/cache"]
    monkeypatch.setattr(sys, "argv", ["inspect", "data=chat", "data.sequence_length=128", *keys, *given])
    return inspect.main()


def test_what_it_writes(tmp_path: Path, monkeypatch: Any, capsys: Any):
    from transformers import AutoTokenizer

    assert _run(tmp_path, monkeypatch, "n=3", f"json={tmp_path}/out.json") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert [line["source"] for line in lines] == [f"{tmp_path}/talk.jsonl:{number}" for number in (1, 2, 3)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert lines[0]["text"] == tokenizer.decode(lines[0]["tokens"])
    pairs = list(zip(lines[0]["tokens"], lines[0]["weights"], strict=True))
    assert tokenizer.decode([token for token, weight in pairs if weight == 0.5]) == "Paris.<|im_end|>"
    assert {weight for _, weight in pairs} == {0, 0.5}
    assert "⟦Paris.<|im_end|>⟧(x 0.5)" in capsys.readouterr().out


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path, monkeypatch: Any):
    assert _run(tmp_path, monkeypatch, f"html={tmp_path}/page.html") == 0
    action = (
        "document.title += ' ' + [document.querySelectorAll('pre').length, document.querySelectorAll('pre mark').length"
    )
    action += ", document.querySelectorAll('rect').length > 0, document.querySelector('pre mark').textContent]"
    page = tmp_path / "page.html"
    page.write_text(page.read_text().replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';"))
    (title,) = re.findall("<title>(.*?)</title>", dom(page, action=action).split("<body>")[0])
    assert title == "data=chat 4,4,true,Paris.&lt;|im_end|&gt;"  # no text of a row ran


@pytest.mark.parametrize(
    ("given", "fault"),
    [("n=x", "n: 'x' is not a number"), ("html=/nowhere/x.html", "html: the folder of /nowhere/x.html does not exist")],
)
def test_wrong_input_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any, given: str, fault: str):
    assert _run(tmp_path, monkeypatch, given) == 2
    assert capsys.readouterr().err.startswith(fault)
