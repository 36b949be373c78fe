"""Samples in rows: which share one, and what a row of them holds."""

import pickle
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from bridge.data.batch import sample_ends, to_this_rank
from bridge.data.encode.encoded import Encoded
from bridge.data.loader import Numbered
from bridge.data.sampler import FILLER
from bridge.data.samples import shared
from bridge.data.samples.packed import Packed
from bridge.data.samples.packing import pack
from bridge.data.samples.shared import SamplesConfig
from bridge.data.samples.store import Store, write
from bridge.errors import ConfigError
from bridge.objectives.next_token import NextToken

# Lengths of conversations are spread about like this: many short ones, few that are long.
CHAT = numpy.clip(numpy.random.RandomState(1).lognormal(5.5, 0.9, size=100_000).astype(numpy.int64), 1, 4096)


def by_hand(lengths: list[int], row: int) -> int:
    """Rows of best fit decreasing, looking at every row for every sample."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        enough = [room for room in rooms if room >= length]
        if enough:
            rooms.remove(min(enough))
        rooms.append((min(enough) if enough else row) - length)
    return len(rooms)


@pytest.mark.parametrize("row", [10, 1023, 1024, 1025, 5000])
def test_every_sample_lies_in_one_row_and_rows_are_those_of_best_fit(row: int):
    for seed in range(5):
        lengths = numpy.random.RandomState(seed).randint(1, row + 1, size=300) // (1 + seed) + 1
        lengths = numpy.minimum(lengths, row)
        packed = pack(lengths, row=row, seed=seed)
        assert sorted(sample for one in packed for sample in one) == list(range(300))
        assert all(sum(lengths[one]) <= row for one in packed)
        assert len(packed) == by_hand(lengths.tolist(), row)


def test_many_samples_take_little_time_and_fill_their_rows():
    started = time.process_time()
    packed = pack(CHAT, row=4096, seed=0)
    assert time.process_time() - started < 1
    assert CHAT.sum() / (len(packed) * 4096) > 0.98


def test_the_seed_decides():
    lengths = CHAT[:1000]
    assert pack(lengths, row=4096, seed=1) == pack(lengths, row=4096, seed=1) != pack(lengths, row=4096, seed=2)
    assert pack(numpy.zeros(0, dtype=numpy.int64), row=8, seed=0) == []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    sizes = [4, 0, 3, 9, 1]
    write(tmp_path, [Encoded(range(10 * n, 10 * n + size), [n] * size, "file", n) for n, size in enumerate(sizes)])
    return Store(tmp_path)


def dataset(store: Store, **keys: Any) -> Any:
    made = shared.dataset(SamplesConfig("made", sequence_length=6, **keys), store, numpy.arange(5), seed=0)
    return pickle.loads(pickle.dumps(made))


def test_a_packed_row_holds_samples_and_then_padding(store: Store):
    rows = dataset(store, packing=True)
    assert isinstance(rows, Packed)
    assert [rows.of_row(0).tolist(), rows.of_row(1).tolist()] == [[3], [0, 2]]  # those with nothing to predict are out
    assert len(rows) == 2
    assert rows.fill == 11 / 12
    assert {name: tensor.tolist() for name, tensor in rows[1].items()} == {
        "tokens": [0, 1, 2, 20, 21, 0],
        "labels": [1, 2, 3, 21, 22, 0],
        "loss_mask": [0, 0, 0, 2, 2, 0],
        "position_ids": [0, 1, 2, 0, 1, 0],
        "segment_ids": [0, 0, 0, 1, 1, -1],
    }
    assert rows[0]["tokens"].tolist() == [30, 31, 32, 33, 34, 35]  # too long: cut


def test_rows_without_packing_are_padded_as_far_as_needed(store: Store):
    rows = dataset(store)
    whole = rows.collate([rows[0], rows[2]])
    assert whole["tokens"].tolist() == [[0, 1, 2, 0, 0, 0], [20, 21, 0, 0, 0, 0]]
    assert whole["padding_mask"].tolist() == [[False] * 3 + [True] * 3, [False] * 2 + [True] * 4]
    rows.collate.longest = True
    batch = rows.collate([rows[0], rows[2]])
    assert all(torch.equal(batch[name], whole[name][:, :3]) for name in whole)


def test_a_micro_batch_without_padding_is_one_row(store: Store):
    rows = dataset(store, padding_free=True)
    batch = rows.collate([{**rows[number], "sample_id": torch.tensor(number)} for number in (0, 2, 3)])
    assert batch["tokens"].tolist() == [[0, 1, 2, 20, 21, 30, 31, 32, 33, 34, 35]]
    assert batch["segment_ids"].tolist() == [[0] * 3 + [1] * 2 + [2] * 6]
    assert batch["sample_id"].tolist() == [0, 2, 3]


def test_real_tokens_are_counted(store: Store):
    packed, rows = dataset(store, packing=True), dataset(store)
    together = torch.utils.data.default_collate([packed[0], packed[1]])
    assert NextToken().lengths(together).tolist() == [6, 3, 2]
    assert NextToken().lengths(rows.collate([rows[3], rows[0], rows[2]])).tolist() == [6, 3, 2]
    assert sample_ends(together["segment_ids"]).tolist() == [0, 6, 9, 12]


@pytest.mark.parametrize("way", ["packing", "padding_free", "neither"])
def test_what_fills_a_micro_batch_up_is_padding(store: Store, way: str):
    data = Numbered(dataset(store, **({} if way == "neither" else {way: True})))
    items = [data[0], data[FILLER]]
    batch = getattr(data.dataset, "collate", torch.utils.data.default_collate)(items)
    assert int(NextToken().lengths(batch).sum()) == len(items[0]["tokens"])
    assert float(batch["loss_mask"].sum()) == float(items[0]["loss_mask"].sum())


def test_rows_that_samples_share_become_one(store: Store):
    from bridge import parallel

    packed = dataset(store, packing=True)
    together = torch.utils.data.default_collate([packed[0], packed[1]])
    with parallel.single_process():
        batch = to_this_rank(together, ("tokens", "labels"))
    assert batch["tokens"].tolist() == [[30, 31, 32, 33, 34, 35, 0, 1, 2, 20, 21, 0]]
    assert batch["padding_mask"].tolist() == [[False] * 11 + [True]]
    assert batch["packing"].cu_seqlens_q_padded.tolist() == [0, 6, 9, 12]
    assert batch["packing"].max_seqlen_q == 6


def test_two_ways_to_do_without_padding_are_refused():
    with pytest.raises(ConfigError, match=r"data\.padding_free: true with data\.packing=true"):
        SamplesConfig("made", packing=True, padding_free=True)
