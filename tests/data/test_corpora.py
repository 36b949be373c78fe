"""Corpora of tokens: as a plain loop over the tokenizer makes them, as megatron-core stores them; blends of them."""

import collections
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import tokenizers

from bridge.data import blend, indexed, text
from bridge.data.blend import Blend
from bridge.data.encode import corpus, engine, sharding, tokenizer
from bridge.data.readers import files
from bridge.data.samples import bin_idx
from bridge.data.source import Datasets
from bridge.errors import ConfigError, RunError
from tests.data import shard_job

DOCUMENTS = [f"def f{n}(x):\n    return x + {n}  # naïve ünïcode {n * 7919}\n" * (1 + n % 5) for n in range(90)]
SAMPLES = Path(__file__).parent / "samples"
END = 0  # the first id of a tokenizer trained here


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 ids."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(tokenizer.train(DOCUMENTS, vocab_size=300), directory)
    return directory


def jsonl(path: Path, documents: list[Any], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents))
    return str(path)


def plain_ids(learned: Path, documents: list[str]) -> list[list[int]]:
    """The loop that a reader would write."""
    plain = tokenizers.Tokenizer.from_file(str(learned / "tokenizer.json"))
    return [[*plain.encode(document).ids, plain.token_to_id("<|endoftext|>")] for document in documents]


def mixture(prepared: Any) -> Any:
    from bridge.data.samples import concatenated

    return concatenated.Mixture.of(prepared)


def stored(prefix: str) -> list[list[int]]:
    """Read by megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [document.tolist() for document in IndexedDataset(prefix)]


@pytest.mark.parametrize("num_processes", [1, 3])
def test_tokens_are_those_of_a_plain_loop(
    num_processes: int, learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sharding, "SMALLEST", 500)
    monkeypatch.setattr(sharding, "INTERVAL", 0.0)
    monkeypatch.setattr(files, "READ", 256)
    documents = [*DOCUMENTS[:7], None, "", *DOCUMENTS[7:]]
    config = text.Config(
        path=jsonl(tmp_path / "a.jsonl", documents, field="content"),
        field="content",
        tokenizer=str(learned),
        num_processes=num_processes,
    )
    text.check(config)
    (prefix,) = mixture(text.prepare(config, cache=tmp_path / "cache", seed=1)).train
    assert stored(prefix) == plain_ids(learned, DOCUMENTS)
    assert sorted(path.name for path in Path(prefix).parent.iterdir()) == ["tokens.bin", "tokens.idx"]
    out = capsys.readouterr().out
    assert "docs/s" in out and "tokens/s" in out and " left" in out
    text.prepare(config, cache=tmp_path / "cache", seed=1)
    assert capsys.readouterr().out == ""
    os.utime(tmp_path / "a.jsonl", (1, 1))  # written again: made anew
    (other,) = mixture(text.prepare(config, cache=tmp_path / "cache", seed=1)).train
    assert other != prefix


def test_the_samples_of_text_and_of_tokens_are_the_same_rows(tmp_path: Path) -> None:
    """megatron-core wrote the tokens: the bytes of each text, and 256."""
    rows = [json.loads(line)["text"] for line in (SAMPLES / "text.jsonl").read_text().splitlines()]
    found = text.corpus_of(str(SAMPLES / "text.jsonl"), key="data.path", field="text")
    assert list(found.texts()) == rows and len(rows) == 20
    config = indexed.Config(path=str(SAMPLES / "bytes"), sequence_length=64, split="12,8")
    indexed.check(config)
    prepared = indexed.prepare(config, cache=tmp_path, seed=1)
    assert prepared.vocab_size == 257
    for part, texts in zip(indexed.build(config, prepared, seed=1), (rows[:12], rows[12:]), strict=True):
        encoded = [bytes(row, "utf-8") for row in texts]
        for index in range(len(part)):
            tokens = part[index]["tokens"].tolist()
            first, *whole, last = (bytes(ids) for end, ids in groupby(tokens, lambda one: one == 256) if not end)
            assert all(row in encoded for row in whole)
            assert any(row.endswith(first) for row in encoded) and any(row.startswith(last) for row in encoded)


def test_an_index_is_byte_for_byte_megatron_cores(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[1, 2, 3], [4], [5, 6, 299, 0]]
    for dtype in (numpy.uint16, numpy.int32):
        theirs, ours = tmp_path / f"theirs-{dtype.__name__}", tmp_path / f"ours-{dtype.__name__}"
        builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize(f"{theirs}.idx")
        numpy.array([*chain(*documents)], dtype=dtype).tofile(f"{ours}.bin")
        bin_idx.write_index(ours, numpy.array([3, 1, 4], dtype=numpy.int32), dtype=dtype)
        assert Path(f"{ours}.idx").read_bytes() == Path(f"{theirs}.idx").read_bytes()
        assert bin_idx.largest_id(theirs, bin_idx.read_index(theirs)) == 299
    bin_idx.merge([tmp_path / "ours-int32", tmp_path / "theirs-uint16"], tmp_path / "both", dtype=numpy.uint16)
    assert stored(str(tmp_path / "both")) == documents * 2


def seen(datasets: Datasets, learned: Path, names: str) -> collections.Counter[str]:
    """How many samples are of the corpus of each letter: the letters are the only text."""
    plain = tokenizers.Tokenizer.from_file(str(learned / "tokenizer.json"))
    letters = {plain.token_to_id(name): name for name in names}
    found = collections.Counter[str]()
    for index in range(len(datasets.train)):
        ids = set(datasets.train[index]["tokens"].tolist()) & set(letters)
        found["".join(sorted(letters[one] for one in ids))] += 1
    return found


def write(prefix: Path, learned: Path, letter: str, *, count: int) -> str:
    """A corpus of `count` documents of 8 tokens, 7 of which are `letter`."""
    one = tokenizers.Tokenizer.from_file(str(learned / "tokenizer.json")).token_to_id(letter)
    numpy.array(([one] * 7 + [END]) * count, dtype=numpy.uint16).tofile(f"{prefix}.bin")
    bin_idx.write_index(prefix, numpy.full(count, 8, dtype=numpy.int32), dtype=numpy.uint16)
    return str(prefix)


def test_blends_have_their_shares_and_leave_nothing_unread(learned: Path, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", learned, "a", count=81), write(tmp_path / "b", learned, "b", count=9)
    whole = {"split": "100,0", "sequence_length": 8}

    def read(path: Any) -> Datasets:
        config = indexed.Config(path=path, **whole)
        indexed.check(config)
        return indexed.build(config, indexed.prepare(config, cache=tmp_path / "cache", seed=1), seed=1)

    assert seen(read({a: 3, b: 1}), learned, "ab") == {"a": 80, "b": 27}
    assert seen(read({a: 0.1, b: 0.9}), learned, "ab") == {"a": 80, "b": 720}
    assert seen(read([f"{a}.bin", f"{b}.idx"]), learned, "ab") == {"a": 80, "b": 8}
    assert seen(read(str(tmp_path)), learned, "ab") == {"a": 80, "b": 8}
    assert read(a).valid is None


def test_a_blend_is_each_data_set_in_turn() -> None:
    both = Blend([range(10, 13), range(20, 22)], [0.5, 0.5])
    assert [both[index] for index in range(len(both))] == [10, 11, 12, 20, 21, 20]
    with pytest.raises(IndexError):
        both[6]
    for weight in (0, -1, True, "x", float("inf")):
        with pytest.raises(ConfigError, match="data.path: a has the weight .*; set a number above 0"):
            blend.weighted({"a": weight})


def test_evaluation_sets_are_read_by_name_and_then_nothing_is_split_off(learned: Path, tmp_path: Path) -> None:
    paths = {name: jsonl(tmp_path / f"{name}.jsonl", [name * 40] * 9) for name in "abc"}
    one = {"path": paths["a"], "tokenizer": str(learned), "sequence_length": 8}

    def read(**settings: Any) -> Datasets:
        config = text.Config(**one, **settings)
        text.check(config)
        return text.build(config, text.prepare(config, cache=tmp_path / "cache", seed=1), seed=1)

    ids = {name: set(chain(*plain_ids(learned, [name * 40]))) for name in "abc"}
    named = read(eval={"news": paths["b"], "code": [paths["c"]]})
    assert list(named.valid) == ["news", "code"]
    for name, letter in (("news", "b"), ("code", "c")):
        assert set(named.valid[name][0]["tokens"].tolist()) <= ids[letter]
    single = read(eval=paths["b"])
    assert set(single.valid[0]["tokens"].tolist()) <= ids["b"]
    held_out = read(split="2,1")
    assert len(single.train) == len(named.train) > len(held_out.train)


def test_a_new_tokenizer_learns_nothing_from_what_is_evaluated(tmp_path: Path) -> None:
    for name, word in (("train", "abababab"), ("eval", "cdcdcdcd")):
        jsonl(tmp_path / f"{name}.jsonl", [word * 20] * 9)
    paths = {"path": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    config = text.Config(**paths, vocab_size=270, sequence_length=8)
    prepared = text.prepare(config, cache=tmp_path, seed=1)
    learned = tokenizers.Tokenizer.from_file(str(prepared.tokenizer / "tokenizer.json")).get_vocab()
    assert "abab" in learned and not any(len(token) > 1 and "c" in token and "<" not in token for token in learned)


def write_bytes(change: Any) -> Any:
    def wrong(prefix: Path) -> None:
        for suffix in (".idx", ".bin"):
            path = Path(f"{prefix}{suffix}")
            path.write_bytes(change.get(suffix, lambda content: content)(path.read_bytes()))

    return wrong


WRONG = [
    (lambda prefix: Path(f"{prefix}.bin").unlink(), "a.bin does not exist; set the path of a .bin and .idx"),
    (write_bytes({".idx": lambda content: content[:50]}), r"a.idx is cut off \(50 bytes for 3 sequences\)"),
    (write_bytes({".bin": lambda content: content[:-2]}), r"a.bin is cut off \(46 bytes, its index says 48\)"),
    (write_bytes({".bin": lambda content: content * 2}), r"a.bin is of another index \(96 bytes, its index says 48\)"),
    (write_bytes({".idx": lambda content: b"text" * 20}), "a.idx is no index of megatron-core's"),
    (write_bytes({".idx": lambda content: content[:17] + b"\7" + content[18:]}), "a.idx has version 1 and type 7"),
]


@pytest.mark.parametrize(("damage", "message"), WRONG)
def test_a_damaged_corpus_is_one_line(damage: Any, message: str, learned: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a", learned, "a", count=3)
    damage(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"data.path: .*{message}"):
        indexed.check(indexed.Config(path=path))
    good = write(tmp_path / "b", learned, "b", count=3)
    with pytest.raises(ConfigError, match=f"data.eval.x: .*{message}"):
        indexed.check(indexed.Config(path=good, eval={"x": path}))


def test_ids_that_a_tokenizer_does_not_have_are_named(learned: Path, tmp_path: Path) -> None:
    numpy.array([1, 2, 300], dtype=numpy.int32).tofile(tmp_path / "a.bin")
    bin_idx.write_index(tmp_path / "a", numpy.array([3], dtype=numpy.int32), dtype=numpy.int32)
    config = indexed.Config(path=str(tmp_path / "a"), tokenizer=str(learned), split="1", sequence_length=1)
    with pytest.raises(
        ConfigError, match=r"data.path: \S+a has the token id 300, but the tokenizer in \S+ has 300 ids"
    ):
        indexed.prepare(config, cache=tmp_path, seed=1)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"field": "txt"}, r"data.field: \S+a.jsonl:1 has no field txt; did you mean 'text'\?"),
    ({"field": "n"}, r"data.field: the field n of \S+a.jsonl:1 is 3, not text"),
    ({"end_of_document": "<eos>"}, "data.end_of_document: '<eos>' is no token of"),
    ({"eval": {"x": "nowhere.txt"}}, r"data.eval.x: \S+nowhere.txt does not exist"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_mistakes_are_found_before_anything_is_made(
    settings: dict[str, Any], message: str, learned: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": 3}\n')
    config = {"path": str(tmp_path / "a.jsonl"), "tokenizer": str(learned), **settings}
    with pytest.raises(ConfigError, match=message):
        text.check(text.Config(**config))
    with pytest.raises(ConfigError, match="data.path: is not set"):
        text.Config()


def test_a_tokenising_process_that_dies_is_one_line(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "SMALLEST", 500)
    (tmp_path / "dying.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(sharding, "MODULE", "dying")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    path = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    config = text.Config(path=path, tokenizer=str(learned), num_processes=2)
    with pytest.raises(RunError, match="data: a tokenising process was killed by SIGKILL; the machine may be out of"):
        text.prepare(config, cache=tmp_path, seed=1)


FAULTS: list[tuple[list[list[str]], type[Exception], str]] = [
    ([["late", "refuse 0"], ["refuse 1"]], ConfigError, "data.path: refuse 0"),
    ([["late", "full"], ["refuse 1"]], OSError, "No space left"),
    ([["late", "refuse 0"], ["unreadable"]], ConfigError, "data.path: refuse 0"),
    ([["a"], ["unreadable"], ["refuse 2"]], ConfigError, "data.path: cannot be read"),
]


@pytest.mark.parametrize(("items", "kind", "message"), FAULTS)
@pytest.mark.parametrize("number", [1, 2])
def test_of_several_faults_the_first_is_told_however_many_processes_there_are(
    number: int, items: list[list[str]], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    """Though the second process meets its own long before the first one, and the reader before both."""

    def found() -> Iterator[sharding.Chunk]:
        for n, chunk in enumerate(items):
            if chunk == ["unreadable"]:
                raise ConfigError("data.path: cannot be read")
            yield sharding.Chunk(n, chunk, 0.5)

    with pytest.raises(kind, match=message):
        sharding.write(tmp_path, found(), job=shard_job.Do(), here=shard_job.do, num_processes=number)


KILLED = """
import sys
from pathlib import Path
from bridge.data.encode import corpus, sharding
from bridge.data.text import Config, corpus_of

sharding.SMALLEST = 20_000
config = Config(path=sys.argv[1], tokenizer=sys.argv[2], num_processes=2)
found = corpus_of(config.path, key="data.path", field="text")
print(*corpus.tokenise([found], corpus.Options.of(config), cache=Path(sys.argv[3])).prefixes)
"""


def test_what_is_tokenised_survives_a_kill_and_no_process_does(learned: Path, tmp_path: Path) -> None:
    documents = [document * 30 for document in DOCUMENTS * 4]
    command = [sys.executable, "-c", KILLED, jsonl(tmp_path / "a.jsonl", documents), str(learned), str(tmp_path)]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while len(done := list(tmp_path.glob(".corpus-*/shards/*.idx"))) < 3:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.002)
    children = psutil.Process(first.pid).children()
    assert len(children) == 2
    first.kill()
    first.wait()
    psutil.wait_procs(children, timeout=20)
    assert not any(child.is_running() for child in children)
    os.truncate(done[0].with_suffix(".bin"), 100)  # as a crash of the machine may leave it
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    kept = re.search(r"data: (\d+) finished shards of an earlier start were kept", second.stdout)
    assert kept and len(done) - 1 <= int(kept[1]) < 60
    assert stored(second.stdout.split()[-1]) == plain_ids(learned, documents)


def test_tasks_of_datatrove_make_the_same_tokens(learned: Path, tmp_path: Path) -> None:
    """Five tasks for four files and two rows of a fifth; what a failed task left is finished by the same command."""
    pytest.importorskip("datatrove")
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        jsonl(folder / f"{number}.jsonl", [*DOCUMENTS[number * 20 : number * 20 + 20], None])
    rest = jsonl(tmp_path / "rest.jsonl", DOCUMENTS[80:])
    paths = [str(folder), f"{rest}:2"]
    config = text.Config(path=paths, tokenizer=str(learned), engine={"executor": "local", "tasks": 6, "workers": 2})
    text.check(config)
    options = corpus.Options.of(config)
    found = text.corpus_of(paths, key="data.path", field="text")
    good = (folder / "2.jsonl").read_text()
    (folder / "2.jsonl").write_text(good + "{")
    stat = os.stat(folder / "2.jsonl")
    with pytest.raises(RunError, match="data.engine: datatrove's tasks failed with exit code"):
        corpus.tokenise([found], options, cache=tmp_path)
    (folder / "2.jsonl").write_text(good)
    os.utime(folder / "2.jsonl", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".corpus-*/shards/logs/completions/*")}
    assert done
    (prefix,) = corpus.tokenise([found], options, cache=tmp_path).prefixes
    assert stored(prefix) == plain_ids(learned, DOCUMENTS[:82])
    here = corpus.tokenise([found], options._replace(engine=None), cache=tmp_path / "here").prefixes[0]
    assert all(Path(f"{here}{s}").read_bytes() == Path(f"{prefix}{s}").read_bytes() for s in (".bin", ".idx"))


ENGINES: list[tuple[dict[str, Any], str]] = [
    ({"tasks": 3}, "data.engine.executor: null is not known; set local or slurm"),
    ({"executor": "local"}, "data.engine.tasks: null is no number of tasks; set 1 or more"),
    ({"executor": "local", "tasks": 0}, "data.engine.tasks: 0 is no number of tasks"),
]


@pytest.mark.parametrize(("settings", "message"), ENGINES)
def test_an_engine_that_is_not_whole_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.check(settings)
