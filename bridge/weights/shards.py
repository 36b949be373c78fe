"""The tensors of a live model as pieces of whole tensors, whatever its parallel layout.

megatron-core's `sharded_state_dict` says for each local tensor which part of which whole tensor it is (key, global
shape, offset), for tensor, pipeline, virtual-pipeline and expert parallelism alike. Loading copies those parts out of
whole tensors; gathering puts whole tensors together again. No layout is known here.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge import parallel
from bridge.weights import names
from bridge.weights.ledger import Target

# Layers keep keys of their own instead of being stacked along a new axis, so unequal layers and stages work.
METADATA = {"non_homogeneous_layers": True}


class Piece(NamedTuple):
    """A local tensor and its place: `data` is `whole[offsets : offsets + data.shape]`, writable in place."""

    data: Tensor
    offsets: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.data.shape, strict=True))


class Held(NamedTuple):
    """What this rank holds of one whole tensor."""

    target: Target
    pieces: list[Piece]


class Source(NamedTuple):
    """Which rank sends a piece when a whole tensor is gathered."""

    rank: int
    piece: int  # number among that rank's pieces of the tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def pieces(model: Sequence[torch.nn.Module]) -> dict[str, Held]:
    """What this rank's model chunks hold, by checkpoint key, in the model's order. Wrappers (DDP) are seen through."""
    merged: dict[str, Held] = {}
    for entry in (entry for chunk in model for entry in entries(chunk)):
        for key, part in held(entry, entry.data.detach()):
            merged.setdefault(key, Held(part.target, [])).pieces.extend(part.pieces)
    return merged


def entries(chunk: Any) -> Iterator[Any]:
    """megatron-core's ShardedTensor or ShardedTensorFactory of each tensor of a chunk, the tensor itself in `data`."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in nested_values(unwrap(chunk).sharded_state_dict(metadata=dict(METADATA))):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):  # not extra state of Transformer Engine
            assert entry.data is not None
            yield entry


def held(entry: Any, data: Tensor) -> Iterator[tuple[str, Held]]:
    """(checkpoint key, piece) for each part of `data`, a tensor in the shape and the place of that of an entry."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    entry = dataclasses.replace(entry, data=data)
    for tensor in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
        stacked = tensor.prepend_axis_num  # experts: each is an entry of one tensor, moved by itself
        key = names.entry(tensor.key, *tensor.global_offset[:stacked])
        part = tensor.data.view(tensor.local_shape)
        target = Target(tuple(tensor.global_shape[stacked:]), tensor.allow_shape_mismatch, part.dtype)
        yield key, Held(target, [Piece(part, tuple(tensor.global_offset[stacked:]))])


def unwrap(chunk: Any) -> Any:
    """The model chunk inside megatron-core's wrappers (DistributedDataParallel, Float16Module)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def object_keys(model: Sequence[torch.nn.Module]) -> list[str]:
    """Checkpoint keys of this rank's objects other than tensors: `_extra_state`, which megatron-core loads as well."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = [unwrap(chunk).sharded_state_dict(metadata=dict(METADATA)) for chunk in model]
    return [value.unique_key for state in states for value in nested_values(state) if isinstance(value, ShardedObject)]


def targets(model: Sequence[torch.nn.Module]) -> dict[str, Target]:
    """The whole tensors that all ranks' model chunks make up, by key, the same on every rank. A collective."""
    merged: dict[str, Target] = {}
    for rank_targets in parallel.all_gather({key: held.target for key, held in pieces(model).items()}):
        merged.update(rank_targets)
    return merged


@torch.no_grad()
def load(model: Sequence[torch.nn.Module], read: Callable[[str, tuple[slice, ...]], Tensor]) -> None:
    """Fill this rank's tensors: `read(key, place)` gives that part of the whole tensor, cast here to the model's dtype.

    A part may have fewer rows than asked: where the vocabulary is padded, the rows beyond it become zero.
    """
    for key, held in pieces(model).items():
        for piece in held.pieces:
            part = read(key, piece.place)
            if held.target.padded and part.shape != piece.data.shape:
                piece.data.zero_()
                piece.data[: part.shape[0]].copy_(part)
            else:
                assert part.shape == piece.data.shape, (key, part.shape, piece.data.shape)
                piece.data.copy_(part)


@torch.no_grad()
def gather(model: Sequence[torch.nn.Module], keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every whole tensor, padding included, by key, on every rank and on the model's device, one at a time.

    `keys`: only these, in their order. All ranks must run through the iterator together: each tensor is put together by
    broadcasts.
    """
    local = pieces(model)
    sources, wholes = _sources(local)
    device = next(iter(local.values())).pieces[0].data.device
    for key in wholes if keys is None else keys:
        target = wholes[key]
        whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        for source in sources[key]:
            if source.rank == parallel.rank():
                data = local[key].pieces[source.piece].data.contiguous()
            else:
                data = torch.empty(source.shape, dtype=target.dtype, device=device)
            if parallel.size() > 1:
                torch.distributed.broadcast(data.view(-1).view(torch.uint8), src=source.rank)
            whole[Piece(data, source.offsets).place] = data
        yield key, whole


def _sources(local: Mapping[str, Held]) -> tuple[dict[str, list[Source]], dict[str, Target]]:
    """For each key one sender per distinct place (the lowest rank holding it), the same on every rank."""
    summary = {}
    for key, held in local.items():
        summary[key] = (held.target, [(piece.offsets, tuple(piece.data.shape)) for piece in held.pieces])
    sources: dict[str, list[Source]] = {}
    wholes: dict[str, Target] = {}
    for rank, keys in enumerate(parallel.all_gather(summary)):
        for key, (target, places) in keys.items():
            wholes.setdefault(key, target)
            senders = sources.setdefault(key, [])
            taken = {sender.offsets for sender in senders}
            senders += [Source(rank, piece, *place) for piece, place in enumerate(places) if place[0] not in taken]
    return sources, wholes
