"""From documents to samples: the cache, the tokenizer, the .bin/.idx files and the entropy."""

import collections
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bridge.data import stdlib, text
from bridge.data.encode import tokenizer
from bridge.data.source import Prepared, completed
from bridge.errors import ConfigError

DOCUMENTS = [f"def f{n}(x):\n    return x + {n}  # naïve ünïcode {n * 7919}\n" * (3 + n % 5) for n in range(40)]
SETTINGS = {"sequence_length": 32, "split": "80,20", "vocab_size": 300}


def prepare(cache: Path, documents: Sequence[str] = DOCUMENTS, **changes: Any) -> Prepared:
    """What data=text makes of `documents`, one a line of a file."""
    file = cache / "documents.jsonl"
    if not file.exists():
        cache.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return text.prepare(text.Config(**{"path": str(file), **SETTINGS, **changes}), cache=cache, seed=1)


def test_samples_hold_the_documents_in_order_within_each(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from bridge.data.samples import concatenated

    prepared = prepare(tmp_path)
    data = concatenated.build(prepared, sequence_length=32, seed=1)
    hf = AutoTokenizer.from_pretrained(prepared.tokenizer)
    end = hf.eos_token_id
    expected = [[*hf(document, add_special_tokens=False)["input_ids"], end] for document in DOCUMENTS]
    stream = {tuple(document[:8]) for document in expected[:32]}
    for index in range(len(data.train)):
        sample = data.train[index]
        tokens = sample["tokens"].tolist()
        assert sample["labels"].tolist()[:-1] == tokens[1:] and "attention_mask" not in sample
        for position in [p + 1 for p, token in enumerate(tokens[:-8]) if token == end]:
            assert tuple(tokens[position : position + 8]) in stream  # only training documents follow an end
    assert len(data.train) == (sum(map(len, expected[:32])) - 1) // 32
    assert len(data.valid) == (sum(map(len, expected[32:])) - 1) // 32

    counts = collections.Counter(token for document in expected[32:] for token in document)
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert prepared.unigram_entropy == pytest.approx(entropy)


def test_second_use_reads_the_cache_and_a_change_makes_a_new_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = prepare(tmp_path)
    assert "training a 300-token BPE" in capsys.readouterr().out
    assert prepare(tmp_path) == first
    assert capsys.readouterr().out == ""
    assert prepare(tmp_path, vocab_size=290).directory != first.directory
    assert prepare(tmp_path, split="90,10").directory != first.directory


def test_tokenizer_is_the_same_every_time_and_reads_back_any_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first, second = (tokenizer.train(DOCUMENTS, vocab_size=300) for _ in range(2))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    tokenizer.save(first, tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    odd = "  two  spaces\tżółć 漢字 🙂\x00\n"
    assert hf.decode(hf(odd)["input_ids"]) == odd
    assert hf(odd)["input_ids"] == first.encode([odd])[0][:-1]
    assert tokenizer.load(tmp_path).end_of_document == hf.eos_token_id == first.end_of_document


def test_a_given_tokenizer_is_used_and_kept(tmp_path: Path) -> None:
    tokenizer.save(tokenizer.train(DOCUMENTS[:5], vocab_size=280), tmp_path / "given")
    prepared = prepare(tmp_path, tokenizer=str(tmp_path / "given"))
    assert prepared.vocab_size <= 280
    assert (prepared.tokenizer / "tokenizer.json").read_bytes() == (tmp_path / "given" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 10**6}, "data.sequence_length: 1000000 is longer"),
        ({"tokenizer": "/nowhere"}, "data.tokenizer: /nowhere does not exist"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path, **changes)


def test_nothing_need_be_held_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from bridge.data.samples import concatenated

    prepared = prepare(tmp_path, split="100,0")
    data = concatenated.build(prepared, sequence_length=32, seed=1)
    assert data.valid is None and len(data.train) > 0 and prepared.unigram_entropy is None
    assert "0 held-out tokens\n" in capsys.readouterr().out


def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ConfigError, match="data.cache_dir: cannot write"):
        text.prepare(text.Config(path=str(tmp_path / "file.txt")), cache=tmp_path / "file.txt" / "cache", seed=1)


def fill_and_note(entry: Path, notes: Path) -> None:
    def fill(directory: Path) -> None:
        with notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        (directory / "content").write_text("whole")

    completed(entry, fill=fill)
    assert (entry / "content").read_text() == "whole"


def test_of_many_processes_one_fills_the_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache" / "entry", tmp_path / "notes")
    workers = [context.Process(target=fill_and_note, args=arguments) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert len((tmp_path / "notes").read_text().split()) == 1


def test_a_killed_preparation_leaves_no_entry(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from bridge.data.source import completed\n"
        "def fill(d): (d / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "completed(Path(sys.argv[1]) / 'entry', fill=fill)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "entry").exists()
    fill_and_note(tmp_path / "entry", tmp_path / "notes")


def test_standard_library_is_real_code_in_a_fixed_order() -> None:
    documents = stdlib.documents()
    names = [document.name for document in documents]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if name.startswith(("test/", "site-packages/", "encodings/"))]
    assert names == [document.name for document in stdlib.documents()] and names != sorted(names)
    assert len(documents) > 300


def test_importing_sources_costs_no_torch() -> None:
    code = "import sys, bridge.data.stdlib, bridge.data.mock; print('torch' in sys.modules, 'megatron' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]


def test_manifest_says_what_was_stored(tmp_path: Path) -> None:
    manifest = json.loads((prepare(tmp_path).directory / "manifest.json").read_text())
    assert manifest["documents"] == 40 and manifest["vocab_size"] <= 300
    assert manifest["train_tokens"] > manifest["heldout_tokens"] > 0
