"""What a conversion has to move, worked out before a byte moves, and the account that each tensor moved once."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from bridge.errors import ConversionError
from bridge.weights import names
from bridge.weights.ops import Op
from bridge.weights.spec import TensorSpec
from bridge.weights.table import Table

# Tensors of a training checkpoint that are not weights: megatron-core's optimizer state, alone or chained.
OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
NUM_NAMED = 3  # names an error spells out before it only counts


class Target(NamedTuple):
    """What a model keeps under one checkpoint key: global shape, whether rows may be vocabulary padding, and dtype."""

    shape: tuple[int, ...]
    padded: bool
    dtype: torch.dtype


class Move(NamedTuple):
    """One Megatron tensor and the Hugging Face tensors it is made of. `shape` is the global one without padding."""

    mcore_key: str
    shape: tuple[int, ...]
    target: Target
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    op: Op
    keep_dtype: bool = False  # no cast to 16 bits touches it


def plan(table: Table, targets: Mapping[str, Target], *, vocab_size: int) -> list[Move]:
    """The move that fills each key of a model, in the model's order.

    `vocab_size` is the true one: padded tensors lose the rows beyond it. Raises ConversionError when the table has no
    row for a key, or gives one Hugging Face tensor to two keys.
    """
    moves = []
    unknown = [key for key in targets if table.entry(key) is None]
    if unknown:
        raise ConversionError(f"the family's table has no row for {name_some(unknown)} of the model")
    for key, target in targets.items():
        entry = table.entry(key)
        assert entry is not None
        shape = (vocab_size, *target.shape[1:]) if target.padded else target.shape
        shapes = [tuple(part.shape) for part in entry.op.split(torch.empty(shape, device="meta"))]
        moves.append(Move(key, shape, target, entry.hf_names, tuple(shapes), entry.op, entry.keep_dtype))
    counts = Counter(name for move in moves for name in move.hf_names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ConversionError(f"the family's table uses {name_some(twice)} for more than one tensor of the model")
    return moves


def check_hf(moves: Iterable[Move], found: Mapping[str, TensorSpec], *, table: Table, source: object) -> None:
    """Every tensor the moves need is there in the right shape, and all others are Ignore rows. Else ConversionError."""
    wanted = {name: shape for move in moves for name, shape in zip(move.hf_names, move.hf_shapes, strict=True)}
    found = names.spread(found, wanted=wanted)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ConversionError(f"{source}: {name_some(missing)} missing; the model's config asks for it")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            have = list(found[name].shape)
            raise ConversionError(f"{source}: {name} has shape {have}, but the model's config makes it {list(shape)}")
    extra = [name for name in found if name not in wanted and table.ignored(name) is None]
    if extra:
        raise ConversionError(f"{source}: {name_some(extra)} would be lost; the model's config has no place for it")


def check_megatron(
    moves: Iterable[Move], found: Mapping[str, TensorSpec], *, source: object, described_by: str = "model.yaml"
) -> None:
    """Every key the moves need is there with the right shape; all others are optimizer state. Else ConversionError.

    `described_by` is what the message calls the place that says which model it is.
    A padded tensor may have any number of rows from the true vocabulary up.
    """
    wanted = {move.mcore_key: move for move in moves}
    found = names.spread(found, wanted=wanted)
    missing = [key for key in wanted if key not in found]
    if missing:
        raise ConversionError(f"{source}: {name_some(missing)} missing; {described_by} asks for it")
    for key, move in wanted.items():
        shape = found[key].shape
        fits = shape == move.shape
        if move.target.padded and len(shape) == len(move.shape):
            fits = shape[0] >= move.shape[0] and shape[1:] == move.shape[1:]
        if not fits:
            raise ConversionError(
                f"{source}: {key} has shape {list(shape)}, but {described_by} makes it {list(move.shape)}"
            )
    extra = [key for key in found if key not in wanted and not key.startswith(OPTIMIZER_PREFIXES)]
    if extra:
        raise ConversionError(f"{source}: {name_some(extra)} would be lost; {described_by} has no place for it")


class Ledger:
    """Counts what was read and written; `balance()` raises ConversionError unless each expected name came once."""

    def __init__(self, *, read: Iterable[str], written: Iterable[str]) -> None:
        self._open = {"read": Counter(iter(read)), "written": Counter(iter(written))}

    def read(self, name: str) -> None:
        self._open["read"][name] -= 1

    def wrote(self, name: str) -> None:
        self._open["written"][name] -= 1

    def balance(self) -> None:
        for verb, counts in self._open.items():
            wrong = [name for name, count in counts.items() if count]
            if wrong:
                raise ConversionError(f"{name_some(wrong)} not {verb} exactly once; this is a bug of the conversion")


def name_some(tensors: Iterable[str]) -> str:
    """'a', 'a, b, c', 'a, b, c and 12 more tensors'."""
    listed = list(tensors)
    more = len(listed) - NUM_NAMED
    return ", ".join(listed[:NUM_NAMED]) + (f" and {more} more tensors" if more > 0 else "")
