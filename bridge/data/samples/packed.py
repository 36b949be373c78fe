"""Samples that share rows of one length."""

from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from bridge.data.samples import packing
from bridge.data.samples.rows import fingerprint, item_of, join, positions, whole_pieces
from bridge.data.samples.store import Store


class Packed:
    """A map-style dataset of rows of `sequence_length` tokens, full of the samples numbered `ids` in `store`.

    Item: what a batch.Batch has, [sequence_length] each, with segment_ids. Samples never see each other, and positions
    begin anew with each. One that is longer than a row is cut; one without anything to predict is left out.
    """

    rows = "packed"

    def __init__(self, store: Store, ids: NDArray[numpy.int64], *, sequence_length: int, seed: int) -> None:
        self.store, self.sequence_length = store, sequence_length
        self.multiple, _ = whole_pieces()
        assert sequence_length % self.multiple == 0
        real = positions(store.lengths[ids], sequence_length=sequence_length)
        ids, real = numpy.asarray(ids)[real > 0], real[real > 0]
        sizes = -(-real // self.multiple) * self.multiple
        packed = packing.pack(sizes, row=sequence_length, seed=seed)
        # Two arrays, not a list for each row: to a loader process they go as bytes.
        self.samples = ids[numpy.concatenate([numpy.array(one) for one in packed])] if packed else ids
        self.ends = numpy.cumsum([len(one) for one in packed], dtype=numpy.int64)
        self.num_tokens = int(real.sum())

    @property
    def identity(self) -> str:
        """Changes with which samples share which row: in another layout they are padded to another multiple."""
        return fingerprint(self.samples, self.ends)

    @property
    def fill(self) -> float:
        """The share of all positions that are no padding."""
        return self.num_tokens / max(1, len(self) * self.sequence_length)

    @property
    def ids(self) -> NDArray[numpy.int64]:
        """The numbers of all its samples, in the store's order."""
        return numpy.sort(self.samples)

    def of_row(self, index: int) -> NDArray[numpy.int64]:
        """Numbers in the store of the samples in a row, in their order there."""
        return self.samples[self.ends[index - 1] if index else 0 : self.ends[index]]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        length = self.sequence_length
        items = [item_of(self.store, int(sample), sequence_length=length) for sample in self.of_row(index)]
        row: dict[str, torch.Tensor] = join(items, sample=self.multiple, length=length)
        return {name: tensor[0] for name, tensor in row.items()}
