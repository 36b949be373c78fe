"""Samples in rows: each in one of its own, the rest of which is padding; or without padding, one behind the other."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridge import parallel
from bridge.data.sampler import FILLER
from bridge.data.samples.store import Store

Item = dict[str, Tensor]


def positions(lengths: NDArray[numpy.int64], *, sequence_length: int) -> NDArray[numpy.int64]:
    """Positions of samples with so many tokens: one less, as the last token is only predicted, and no more than fit."""
    return numpy.clip(lengths - 1, 0, sequence_length)


def item_of(store: Store, index: int, *, sequence_length: int) -> Item:
    """The first `sequence_length` positions of a sample, unpadded: the values of a batch.Batch, [positions] each."""
    sample = store[index]
    length = min(max(len(sample.tokens) - 1, 0), sequence_length)
    tokens = torch.from_numpy(sample.tokens[: length + 1].astype(numpy.int64))
    return {
        "tokens": tokens[:length],
        "labels": tokens[1 : length + 1],
        "loss_mask": torch.from_numpy(sample.weights[1 : length + 1].astype(numpy.float32)),
        "position_ids": torch.arange(length),
    }


def padded(tensor: Tensor, length: int, value: int = 0) -> Tensor:
    """`tensor` [positions] and behind it `value`, [length]."""
    return torch.nn.functional.pad(tensor, (0, length - len(tensor)), value=value)


def _num_real(item: Item) -> int:
    """Positions of an item that are no padding; of one that fills a micro-batch up, none."""
    return 0 if "sample_id" in item and item["sample_id"] == FILLER else len(item["tokens"])


def whole_pieces() -> tuple[int, int]:
    """What the lengths of a sample and of a row that samples share are multiples of in this layout.

    Each sample is cut into 2 pieces for each context-parallel rank, a row into equal parts for tensor-parallel ones.
    """
    cp, tp = (parallel.size("cp"), parallel.size("tp")) if parallel.has_groups() else (1, 1)
    sample = 2 * cp if cp > 1 else 1
    return sample, sample * tp


def fingerprint(*arrays: NDArray[numpy.int64]) -> str:
    """16 hexadecimal digits that change with the numbers."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


class Rows:
    """A map-style dataset of the samples numbered `ids` in `store`, one in a row.

    A sample of L tokens has L - 1 positions: each token but the last, which predicts the next one. Rows have
    `sequence_length` positions, or, where `collate.longest` is set, as many as the longest of the micro-batch. Padding
    has token 0, weight 0 and a true `padding_mask`.
    """

    rows = "padded"

    def __init__(self, store: Store, ids: NDArray[numpy.int64], *, sequence_length: int) -> None:
        self.store, self.ids, self.sequence_length = store, ids, sequence_length
        self.collate = Pad(sequence_length, multiple=whole_pieces()[1])

    @property
    def identity(self) -> str:
        """Changes with what is held out, data.split."""
        return fingerprint(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Item:
        return item_of(self.store, int(self.ids[index]), sequence_length=self.sequence_length)


class Pad:
    """Makes a micro-batch of items of different lengths. longest: no longer than the longest needs."""

    def __init__(self, sequence_length: int, *, multiple: int, longest: bool = False) -> None:
        self.sequence_length, self.multiple, self.longest = sequence_length, multiple, longest

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        needed = max(1, *(len(item["tokens"]) for item in items))
        length = self.sequence_length
        if self.longest:
            length = min(length, -(-needed // self.multiple) * self.multiple)
        by_token = ("tokens", "labels", "loss_mask")
        batch = {key: torch.stack([padded(item[key], length) for item in items]) for key in by_token}
        batch["position_ids"] = torch.arange(length).repeat(len(items), 1)
        batch["padding_mask"] = torch.arange(length) >= torch.tensor([_num_real(item) for item in items])[:, None]
        return {**batch, **_other(items, without=batch)}


class Unpadded(Rows):
    """The same samples, but those of a micro-batch make one row, one behind the other (data.padding_free)."""

    rows = "packed"

    def __init__(self, store: Store, ids: NDArray[numpy.int64], *, sequence_length: int) -> None:
        super().__init__(store, ids, sequence_length=sequence_length)
        self.collate: Any = Join(*whole_pieces())


class Join:
    """Makes one row of the items of a micro-batch: [1, tokens], with the number of each token's item."""

    def __init__(self, sample: int, row: int) -> None:
        self.sample, self.row = sample, row

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return {
            **join(items, sample=self.sample, multiple=self.row),
            **_other(items, without=items[0], keep="sample_id"),
        }


def join(items: Sequence[Item], *, sample: int, multiple: int = 1, length: int | None = None) -> dict[str, Tensor]:
    """`items` one behind the other, [1, tokens], each padded to a multiple of `sample`, then all to `length` or else a
    `multiple`. segment_ids: int32, the number of a token's item, -1 for padding."""
    sizes = [-(-max(len(item["tokens"]), 1) // sample) * sample for item in items]
    total = sum(sizes)
    length = -(-total // multiple) * multiple if length is None else length
    row = {}
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        parts = [padded(item[key], size) for item, size in zip(items, sizes, strict=True)]
        row[key] = padded(torch.cat(parts), length)[None]
    numbers = [torch.full((_num_real(item),), n, dtype=torch.int32) for n, item in enumerate(items)]
    ids = torch.cat([padded(part, size, -1) for part, size in zip(numbers, sizes, strict=True)])
    row["segment_ids"] = padded(ids, length, -1)[None]
    return row


def _other(items: Sequence[Item], *, without: Any, keep: str = "") -> dict[str, Tensor]:
    """What else the items have, stacked."""
    names = [name for name in items[0] if name not in without or name == keep]
    return {name: torch.stack([item[name] for item in items]) for name in names}
