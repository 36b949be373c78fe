"""Encoded samples, written and read again."""

import pickle
from pathlib import Path

from bridge.data.encode.encoded import Encoded
from bridge.data.samples.store import Store, write

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
