"""Encoded samples, written and read again."""

import os
import pickle
from pathlib import Path

import numpy

from bridge.data.blend import Blend
from bridge.data.encode.encoded import Encoded
from bridge.data.samples.packed import Packed
from bridge.data.samples.rows import Rows, Unpadded
from bridge.data.samples.store import Store, is_whole, merge, write

SAMPLES = [
    Encoded([5, 6, 7], [0.0, 1.0, 0.5], "a.jsonl", 1),
    Encoded([], [], "a.jsonl", 2),
    Encoded([70000, 9], [0.0, 2.0], "b.jsonl", 7),
]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, iter(SAMPLES))
    store = pickle.loads(pickle.dumps(Store(tmp_path)))
    assert [Encoded(s.tokens.tolist(), s.weights.tolist(), s.file, s.line) for s in store] == SAMPLES
    assert store.lengths.tolist() == [3, 0, 2]


def test_nothing_is_written_and_read(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert len(Store(tmp_path)) == 0


def test_rows_have_another_identity_with_other_samples_or_packed(tmp_path: Path) -> None:
    write(tmp_path, [Encoded([1, 2, 3], [0.0, 1.0, 1.0], "a.jsonl", line) for line in range(4)])
    store, some, all_of_them = Store(tmp_path), numpy.arange(3), numpy.arange(4)
    same = Rows(store, some, sequence_length=4).identity
    assert same == Rows(store, some, sequence_length=4).identity == Unpadded(store, some, sequence_length=4).identity
    others = {
        Rows(store, all_of_them, sequence_length=4).identity,
        Packed(store, some, sequence_length=4, seed=1).identity,
        Packed(store, all_of_them, sequence_length=4, seed=1).identity,
        Blend([Rows(store, some, sequence_length=4)] * 2, [1.0, 1.0]).identity,
        Blend([Rows(store, some, sequence_length=4)] * 2, [1.0, 3.0]).identity,
    }
    assert len(others - {same}) == 5


def test_parts_become_what_is_written_at_once(tmp_path: Path) -> None:
    parts = {"a": SAMPLES[:1], "b": [], "c": SAMPLES[1:], "d": [*reversed(SAMPLES)]}
    for name, part in {**parts, "whole": [*SAMPLES, *reversed(SAMPLES)], "merged": []}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, part)
    assert all(is_whole(tmp_path / name) for name in parts)
    merge([tmp_path / name for name in parts], tmp_path / "merged")
    for file in (tmp_path / "whole").iterdir():
        merged = tmp_path / "merged" / file.name
        assert merged.read_bytes() == file.read_bytes()
        os.truncate(merged, file.stat().st_size - 4)  # as a crash of the machine may leave it
        assert not is_whole(tmp_path / "merged")
        merged.write_bytes(file.read_bytes())
