"""The keys of a checkpoint against those the present model and optimizer ask for, on all ranks together."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensorFactory

from bridge import parallel, platform
from bridge.checkpoint.content import RANDOM_STATE
from bridge.weights.ledger import OPTIMIZER_PREFIXES, name_some

WEIGHT, BUFFER, OPTIMIZER, EXTRA_STATE, GENERATOR = "weight", "buffer", "optimizer tensor", "extra state", "generator"
UNIMPORTANT = (EXTRA_STATE, GENERATOR)
# Persistent buffers of megatron-core's modules, by their last name.
BUFFER_NAMES = ("expert_bias",)


def kind(key: str) -> str:
    """The class of a stored tensor or object: extra state is the kernels', a generator's belongs to one layout."""
    if key.startswith(RANDOM_STATE):
        return GENERATOR
    if "_extra_state" in key:
        return EXTRA_STATE
    if key.startswith(OPTIMIZER_PREFIXES):
        return OPTIMIZER
    return BUFFER if key.rpartition(".")[2] in BUFFER_NAMES else WEIGHT


def keys_of(value: Any) -> Iterator[str]:
    """Under which keys the values in a sharded state dict are stored: several for one that is stored in pieces."""
    if isinstance(value, ShardedTensorFactory):
        yield from keys_of(value.build())
    elif isinstance(value, ShardedObject):
        yield value.unique_key
    elif isinstance(value, ShardedBase):
        yield value.key
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from keys_of(inner)


def without_missing_extra_state(wanted: dict[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """`wanted` less the kernels' `_extra_state` that is not stored; checkpoints of other kernels have less or more."""

    def keep(value: Any) -> bool:
        return kind(getattr(value, "key", "")) != EXTRA_STATE or all(key in stored for key in keys_of(value))

    return {
        name: {key: inner for key, inner in value.items() if keep(inner)} if isinstance(value, dict) else value
        for name, value in wanted.items()
    }


class Differences(NamedTuple):
    """Keys that a checkpoint lacks, and keys in it that no rank asks for, without the unimportant ones."""

    missing: list[str]
    unasked: list[str]

    def __str__(self) -> str:
        lacks = f"it lacks {by_class(self.missing)} of this run" if self.missing else ""
        too_much = f"it has {by_class(self.unasked)} that this run does not use" if self.unasked else ""
        return "; ".join(filter(None, (lacks, too_much)))

    @property
    def kinds(self) -> set[str]:
        return {kind(key) for key in (*self.missing, *self.unasked)}


def differences(wanted: dict[str, Any], stored: Iterable[str]) -> Differences:
    """What the ranks want and a checkpoint has, compared: the same on every rank. A collective call."""
    names = sorted(stored)
    number_of = {name: number for number, name in enumerate(names)}
    ours = set(keys_of(wanted))
    asked = torch.zeros(len(names), dtype=torch.int32, device=platform.device())
    asked[torch.tensor([number_of[key] for key in ours if key in number_of], dtype=torch.int64)] = 1
    torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
    unasked = [name for name, count in zip(names, asked.tolist(), strict=True) if not count]
    missing = {key for keys in parallel.all_gather(ours - number_of.keys()) for key in keys}
    return Differences(*(sorted(key for key in keys if kind(key) not in UNIMPORTANT) for keys in (missing, unasked)))


def by_class(keys: Iterable[str]) -> str:
    """As in: 3 weights (a, b, c), 1 buffer (d)."""
    classes: dict[str, list[str]] = {name: [] for name in (WEIGHT, BUFFER, OPTIMIZER)}
    for key in keys:
        classes[kind(key)].append(key)
    return ", ".join(
        f"{len(found)} {name}{'s' if len(found) > 1 else ''} ({name_some(found)})"
        for name, found in classes.items()
        if found
    )
