"""How the tensors of a Hugging Face model make one Megatron tensor, and back.

An op is a pair: `merge(parts) -> fused` and `split(fused) -> parts`, with `split(merge(parts)) == parts` bit for bit.
It works along dim 0 and keeps the trailing dims (Transposed and Flat apart), so a weight `[out, in]` and its bias
`[out]` use the same op. It always sees whole tensors: ranks and shards are none of its business. Meta tensors tell
shapes. torch is imported with the first tensor: a family's table is read before a run has started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Op(Protocol):
    """Reversible map between `num_parts` Hugging Face tensors and one Megatron tensor."""

    @property
    def num_parts(self) -> int: ...

    def merge(self, parts: Sequence[Tensor]) -> Tensor: ...

    def split(self, fused: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Copy:
    """One tensor, taken as it is."""

    num_parts: int = 1

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part

    def split(self, fused: Tensor) -> tuple[Tensor, ...]:
        return (fused,)


@dataclass(frozen=True)
class Stack:
    """Equal parts one below the other: `[n, ...] * num_parts -> [num_parts * n, ...]`, such as gate above up in fc1."""

    num_parts: int = 2

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        assert len(parts) == self.num_parts
        return _cat(parts)

    def split(self, fused: Tensor) -> tuple[Tensor, ...]:
        assert fused.shape[0] % self.num_parts == 0
        return fused.tensor_split(self.num_parts)


@dataclass(frozen=True)
class Qkv:
    """Query, key and value in megatron-core's order: for every query group its queries, then its key, then its value.

    Parts: q `[num_attention_heads * kv_channels, ...]`, k and v `[num_query_groups * kv_channels, ...]`.
    Fused: `[(num_attention_heads + 2 * num_query_groups) * kv_channels, ...]`.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    num_parts: int = 3

    def __post_init__(self) -> None:
        assert self.num_attention_heads % self.num_query_groups == 0

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        groups = [part.unflatten(0, (self.num_query_groups, -1)) for part in parts]
        return _cat(groups, dim=1).flatten(0, 1)

    def split(self, fused: Tensor) -> tuple[Tensor, ...]:
        query = self.num_attention_heads // self.num_query_groups * self.kv_channels
        groups = fused.unflatten(0, (self.num_query_groups, query + 2 * self.kv_channels))
        return tuple(part.flatten(0, 1) for part in groups.split([query, self.kv_channels, self.kv_channels], dim=1))


@dataclass(frozen=True)
class Joined:
    """`op` with its parts lying one below the other, `sizes` rows each, in one Hugging Face tensor."""

    op: Op
    sizes: tuple[int, ...]
    num_parts: int = 1

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        (joined,) = parts
        return self.op.merge(joined.split(self.sizes))

    def split(self, fused: Tensor) -> tuple[Tensor, ...]:
        return (_cat(self.op.split(fused)),)


@dataclass(frozen=True)
class Interleaved:
    """Gate and up of each channel side by side, `[2n, ...]`, as all gates above all ups."""

    num_parts: int = 1

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        (pairs,) = parts
        return pairs.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    def split(self, fused: Tensor) -> tuple[Tensor, ...]:
        return (fused.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1),)


@dataclass(frozen=True)
class Flat:
    """One tensor with a first dim of 1, `[1, ...]`, without it."""

    num_parts: int = 1

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part.squeeze(0)

    def split(self, fused: Tensor) -> tuple[Tensor, ...]:
        return (fused.unsqueeze(0),)


@dataclass(frozen=True)
class Transposed:
    """`op` on Hugging Face weights stored as `[in, out]` (GPT-2's Conv1D); a bias has one dim and stays."""

    op: Op

    @property
    def num_parts(self) -> int:
        return self.op.num_parts

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return self.op.merge([_transposed(part) for part in parts])

    def split(self, fused: Tensor) -> tuple[Tensor, ...]:
        return tuple(_transposed(part) for part in self.op.split(fused))


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(tuple(parts), dim=dim)
