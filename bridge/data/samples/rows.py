"""One sample in a row: what is left of the row is padding."""

from typing import Any

import numpy
import torch

from bridge.data.samples.store import Store


class Rows:
    """A map-style dataset of the first `sequence_length` positions of the samples numbered `ids` in `store`.

    A sample of L tokens has L - 1 positions: each token but the last, which predicts the next one. Padding has token 0
    and weight 0.
    """

    def __init__(self, store: Store, ids: numpy.ndarray, *, sequence_length: int) -> None:
        self.store, self.ids, self.sequence_length = store, ids, sequence_length

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.store[int(self.ids[index])]
        tokens = torch.zeros(self.sequence_length + 1, dtype=torch.int64)
        weights = torch.zeros(self.sequence_length + 1)
        length = min(len(sample.tokens), self.sequence_length + 1)
        tokens[:length] = torch.from_numpy(sample.tokens[:length].astype(numpy.int64))
        weights[:length] = torch.from_numpy(sample.weights[:length].astype(numpy.float32))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": weights[1:],
            "position_ids": torch.arange(self.sequence_length),
        }
