"""One micro-batch, and the part of it that this rank computes with."""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
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
    padding_mask: Tensor  # bool [B, S], of rows with one sample each: true for padding
    sample_id: Tensor  # int64 [B], index in the dataset; FILLER (bridge.data.sampler) of a row that does not count
    packing: Any  # what attention of samples that share a row needs; only in what `to_this_rank` gives


def to_this_rank(batch: Batch | Mapping[str, Tensor], keys: Iterable[str]) -> Batch:
    """`keys` of `batch` on this rank's device; of every sequence, the part that this context-parallel rank has.

    Of C ranks, number r has pieces r and 2 C - 1 - r of the 2 C equal ones that a sequence consists of, which balances
    the work of causal attention. Whole sequences must have a multiple of 2 C tokens.

    Rows with `segment_ids` become one row, [1, B * S], divided sample by sample as Transformer Engine divides them
    (thd_get_partitioned_indices); with it come `packing` and `padding_mask`, which rows of one sample have already.
    """
    whole = dict(cast(Mapping[str, Tensor], batch))
    wanted, by_token = list(keys), whole["tokens"].shape if "tokens" in whole else torch.Size()
    packing = None
    if "segment_ids" in whole:
        ends = sample_ends(whole["segment_ids"])
        packing = _packing(ends)
        whole = {key: one.flatten(0, 1)[None] if one.shape[:2] == by_token else one for key, one in whole.items()}
        by_token = whole["tokens"].shape
        whole["padding_mask"] = whole["segment_ids"] < 0
    if "padding_mask" in whole:
        wanted.append("padding_mask")
    moved: dict[str, Any] = {key: whole[key] for key in wanted}
    if parallel.size("cp") > 1:
        here = _own_tokens(ends) if packing is not None else _own_pieces(by_token[1]) if by_token else None
        for key, tensor in moved.items():
            if tensor.shape[:2] == by_token:
                moved[key] = tensor[:, here]
    moved = {key: tensor.to(platform.device(), non_blocking=True) for key, tensor in moved.items()}
    return cast(Batch, moved if packing is None else moved | {"packing": packing})


def sample_ends(segment_ids: Tensor) -> Tensor:
    """Where samples of `segment_ids` [B, S] begin and end in one row [B * S]: int32 [samples + 1], from 0 to B * S.

    Padding belongs to the sample before it: a causal model lets no real token see it.
    """
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]) & (segment_ids[:, 1:] >= 0)
    last = torch.tensor([segment_ids.numel()], device=segment_ids.device)
    return torch.cat([begins.flatten().nonzero()[:, 0], last]).int()


def _packing(ends: Tensor) -> PackedSeqParams:
    """For attention. The padded lengths are given as the real ones too: kernels that tell them apart are fewer."""
    longest, moved = int(ends.diff().max()), ends.to(platform.device(), non_blocking=True)
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    lengths = dict.fromkeys(names, moved)
    return PackedSeqParams(qkv_format="thd", **lengths, max_seqlen_q=longest, max_seqlen_kv=longest)


def _own_pieces(length: int) -> Tensor:
    """Which tokens of a sequence this context-parallel rank has."""
    size, rank = parallel.size("cp"), parallel.rank("cp")
    pieces = torch.arange(length).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[-1 - rank]])


def _own_tokens(ends: Tensor) -> Tensor:
    """The same of the samples of a row that end there."""
    size, rank = parallel.size("cp"), parallel.rank("cp")
    lengths = ends.diff().long()
    assert not (lengths % (2 * size)).any(), "samples are padded to whole pieces"
    piece = torch.arange(int(ends[-1])) - ends[:-1].long().repeat_interleave(lengths)
    piece //= (lengths // (2 * size)).repeat_interleave(lengths)
    return ((piece == rank) | (piece == 2 * size - 1 - rank)).nonzero()[:, 0]
