"""One micro-batch, and the part of it that this rank computes with."""

from collections.abc import Iterable, Mapping
from typing import TypedDict, cast

import torch
from torch import Tensor

from bridge import parallel, platform


class Batch(TypedDict, total=False):
    """What a loader yields and an objective reads. B: sequences of a micro-batch, S: tokens of a sequence.

    A source may add keys of its own, which an objective that names them gets. A tensor whose first two sizes are those
    of `tokens` has a value for each token, and is divided between context-parallel ranks; any other is not.
    """

    tokens: Tensor  # int64 [B, S], ids below model.vocab_size
    labels: Tensor  # int64 [B, S], what position t should predict: the next token
    loss_mask: Tensor  # float32 [B, S], how much the label counts, 0: not at all; all 0 in what fills up an evaluation
    position_ids: Tensor  # int64 [B, S], 0, 1, ... from the beginning of each text
    segment_ids: Tensor  # int32 [B, S], of rows that samples share: the number of a token's sample, -1 for padding
    sample_id: Tensor  # int64 [B], index in the dataset; FILLER (bridge.data.sampler) of a row that does not count


def to_this_rank(batch: Batch | Mapping[str, Tensor], keys: Iterable[str]) -> Batch:
    """`keys` of `batch` on this rank's device; of every sequence, the part that this context-parallel rank has.

    Of C ranks, number r has pieces r and 2 C - 1 - r of the 2 C equal ones that a sequence consists of, which balances
    the work of causal attention. Whole sequences must have a multiple of 2 C tokens.
    """
    whole = cast(Mapping[str, Tensor], batch)
    moved = {key: whole[key].to(platform.device(), non_blocking=True) for key in keys}
    size, rank = parallel.size("cp"), parallel.rank("cp")
    if size > 1:
        by_token = whole["tokens"].shape
        for key, tensor in moved.items():
            if tensor.shape[:2] == by_token:
                pieces = tensor.chunk(2 * size, dim=1)
                moved[key] = torch.cat([pieces[rank], pieces[-1 - rank]], dim=1)
    return cast(Batch, moved)
