"""bridge.data.seen: samples and numbers of datasets, against the files they are of."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from bridge.data import seen, text
from bridge.data.blend import Blend
from bridge.data.encode.encoded import Encoded
from bridge.data.samples import store
from bridge.data.source import Datasets
from bridge.errors import ConfigError


def _store(directory: Path, lengths: list[int]) -> store.Store:
    """Sample n has tokens 10 n, 10 n + 1, ... of which all but the first two count 0.3."""
    directory.mkdir()
    samples = [
        Encoded(range(10 * n, 10 * n + length), ([1, 0] + [0.3] * 9)[:length], "f.jsonl", n + 1)
        for n, length in enumerate(lengths)
    ]
    store.write(directory, samples)
    return store.Store(directory)


def test_samples_of_a_store_however_they_share_rows(tmp_path: Path):
    from bridge.data.samples.packed import Packed
    from bridge.data.samples.rows import Rows, Unpadded

    lengths = [3, 9, 4, 6, 5]
    stored, ids = _store(tmp_path / "s", lengths), numpy.array([0, 1, 2, 4])
    padded, free = (made(stored, ids, sequence_length=7) for made in (Rows, Unpadded))
    packed = Packed(stored, ids, sequence_length=7, seed=1)
    for dataset in (padded, free, packed):
        found = list(seen.samples(dataset, name="x"))
        assert [one.source for one in found] == ["f.jsonl:1", "f.jsonl:2", "f.jsonl:3", "f.jsonl:5"]
        assert [len(one.tokens) for one in found] == [3, 8, 4, 5]  # a row has 7 positions
        assert found[2] == ([20, 21, 22, 23], [0, 0, 0.3, 0.3], "f.jsonl:3")
    facts = [seen.facts(dataset, sequence_length=7) for dataset in (padded, free, packed)]
    assert {(one.samples, one.tokens, one.trained, one.exact) for one in facts} == {(4, 20, 12 / 20, True)}
    assert [one.fill for one in facts] == [16 / 28, 1.0, 16 / 21]  # 2 + 7 + 3 + 4 positions, in 3 rows of 7
    assert facts[0].lengths.tolist() == [3, 8, 4, 5]


def test_of_many_samples_some_are_counted(tmp_path: Path, monkeypatch: Any):
    from bridge.data.samples.rows import Rows

    monkeypatch.setattr(seen, "MOST_STORED", 2)
    dataset = Rows(_store(tmp_path / "s", [3, 9, 4, 6]), numpy.arange(4), sequence_length=10)
    facts = seen.facts(dataset, sequence_length=10)
    assert (facts.samples, facts.tokens, facts.trained, facts.exact) == (4, 22, (1 + 2) / (3 + 4), False)


def test_a_blend_is_shown_in_turn_and_counted_once(tmp_path: Path):
    from bridge.data.samples.rows import Rows

    few, many = (_store(tmp_path / name, lengths) for name, lengths in [("a", [5]), ("b", [3, 3, 3])])
    parts = [Rows(one, numpy.arange(len(one)), sequence_length=4) for one in (few, many)]
    blend = Blend(parts, [0.9, 0.1])
    assert [len(one.tokens) for one in seen.samples(blend, name="x")] == [5, 3, 3, 3]
    facts = seen.facts(blend, sequence_length=4)
    assert (facts.samples, facts.tokens, sorted(facts.lengths)) == (4, 14, [3, 3, 3, 5])
    assert facts.trained == pytest.approx((3 + 3) / 14)
    assert list(seen.sets(Datasets(parts[0], {"news": parts[1]}))) == ["train", "eval/news"]


def test_a_sample_of_texts_names_the_document_it_begins_in(tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [f"def f{n}(x): return x + {n * 7919}\n" * (3 + n % 5) for n in range(20)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    config = text.Config(path=str(tmp_path / "f.jsonl"), vocab_size=300, sequence_length=16)
    built = text.build(config, text.prepare(config, cache=tmp_path / "cache", seed=1), seed=1)
    found = [one for name, dataset in seen.sets(built).items() for one in seen.samples(dataset, name=name)]
    (prefix,) = {one.source.rpartition(":")[0] for one in found}
    corpus = IndexedDataset(prefix)
    numbers = set()
    for sample in found:
        number = int(sample.source.rpartition(":")[2])
        document = corpus[number - 1].tolist()
        shared = [
            start
            for start in range(len(document))
            if (rest := document[start : start + 17]) == sample.tokens[: len(rest)]
        ]
        assert shared and sample.weights == [0] + [1] * 16
        numbers.add(number)
    assert 20 in numbers and len(numbers) > 10  # the last is held out


def test_items_that_do_not_tell_what_is_trained():
    with pytest.raises(ConfigError, match="data.source: its items have no labels and no loss_mask, so"):
        next(seen.samples([{"tokens": numpy.arange(3)}], name="x"))
