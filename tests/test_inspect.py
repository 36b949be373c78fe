"""bridge.inspect: what it prints and writes, and its page in a real browser."""

import json
import re
import sys
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from bridge import inspect
from bridge.data import mock
from bridge.data.encode import tokenizer as bpe
from bridge.data.seen import Seen
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
    page = tmp_path / "page.html"
    page.write_text(page.read_text().replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';"))
    action = """
    const first = document.querySelector("pre"), marks = [...first.querySelectorAll("mark")];
    const after = () => getComputedStyle(marks[0], "::after").content;
    const before = after();
    document.getElementById("weights").click();
    document.title = JSON.stringify({
      title: document.title, texts: document.querySelectorAll("pre").length, text: first.textContent,
      trained: marks.map(mark => mark.textContent).join(""), weights: marks.map(mark => mark.dataset.weights),
      shown: [before, after()], facts: [...document.querySelectorAll("tr")].map(row => row.textContent),
      bars: [...document.querySelectorAll("rect")].map(bar => bar.textContent),
    })
    """
    (title,) = re.findall("<title>(.*?)</title>", dom(page, action=action).split("<body>")[0])
    shown = json.loads(unescape(title))
    assert (shown["title"], shown["texts"]) == ("data=chat", 4)  # no text of a row ran
    assert shown["text"] == f"<|im_start|>user\n{SCRIPT}<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
    assert shown["trained"] == "Paris.<|im_end|>" and set(shown["weights"]) == {"0.5"}
    assert shown["shown"] == ["none", '"0.5"']
    number = len(shown["weights"])
    tokens = re.findall(r"(\d+) tokens", shown["facts"][0])[0]
    assert f"{4 * number / int(tokens):.1%} trained" in shown["facts"][0]
    assert f"rows {(int(tokens) - 4) / (4 * 128):.1%} full" in shown["facts"][0]
    assert [bar.endswith(": 4") for bar in shown["bars"]] == [False] * (len(shown["bars"]) - 1) + [True]


def test_on_a_terminal_the_text_of_a_sample_rules_nothing(capsys: Any):
    sample = Seen([ord(letter) for letter in "a\x1b[2Jb"], [0, 0, 0, 0, 1, 1], "f:1")
    view = inspect.View("t", iter([("train", sample)]), {}, lambda ids: "".join(map(chr, ids)))
    assert list(inspect._printed(view, colours=True)) == [("train", sample)]
    assert capsys.readouterr().out == "--- f:1 (train): 6 tokens, 2 trained\na\\x1b[2\x1b[32mJb\x1b[0m\n"


def test_texts_of_tokens_make_the_text(tmp_path: Path):
    """Of tokens that are parts of characters, too, and of a decoder that writes a token otherwise at the beginning."""
    import tokenizers

    odd = "  two  spaces\tżółć 漢字 🙂\x00\n and more"
    bytes_ = bpe.train(["some text"], vocab_size=300).tokenizer
    words = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.decoder = tokenizers.decoders.Metaspace()
    words.train_from_iterator([odd], tokenizers.trainers.BpeTrainer(vocab_size=30, special_tokens=["?"]))
    for tokenizer in (bytes_, words):
        ids = tokenizer.encode(odd).ids
        for part in (ids, ids[1:], ids[: len(ids) // 2]):
            decode = partial(tokenizer.decode, skip_special_tokens=False)
            found = list(inspect.pieces(part, decode))
            assert "".join(text for _, text in found) == decode(part)
            assert sum(number for number, _ in found) == len(part) and len(found) > 3
    assert (4, "🙂") in inspect.pieces(bytes_.encode("a🙂b").ids, bytes_.decode)


def test_random_tokens(tmp_path: Path, monkeypatch: Any, capsys: Any):
    given = ["data=mock", "data.sequence_length=3", "data.num_samples=2", "n=all", f"json={tmp_path}/out.json"]
    assert inspect.main(given) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert [(line["set"], line["source"]) for line in lines] == [
        ("train", "mock train:1"),
        ("train", "mock train:2"),
        ("eval", "mock eval:1"),
    ]
    options = mock.Config(sequence_length=3, num_samples=2)
    train = mock.build(options, mock.prepare(options, cache=tmp_path, seed=1234), seed=1234).train
    for line, item in zip(lines, (train[0], train[1]), strict=False):
        assert line["tokens"] == [item["tokens"][0].item(), *item["labels"].tolist()]
        assert line["weights"] == [0, 1, 1, 1] and line["text"].split() == [*map(str, line["tokens"])]
    assert "train: 2 samples, 8 tokens, 4 to 4 each, half of them up to 4, 75.0% trained, rows 100.0% full" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("n=x", "n: 'x' is not a number of samples; set e.g. n=5, or n=all"),
        ("n=0", "n: '0' is not a number"),
        ("html=/nowhere/x.html", "html: the folder of /nowhere/x.html does not exist"),
        ("json=/", "json: '/' is no file to write; set json=FILE"),
        ("json=", "json: '' is no file to write"),
        ("data.path=/nowhere", "data.path: /nowhere does not exist"),
        ("init.path=/nowhere", "init.path: /nowhere"),
        ("data.colums=3", "data.colums: "),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any, given: str, fault: str):
    assert _run(tmp_path, monkeypatch, given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(fault) and err.count("\n") == 1
