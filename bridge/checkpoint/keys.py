"""The keys of a checkpoint against those the present model and optimizer ask for, on all ranks together."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensorFactory

from bridge import platform
from bridge.weights.ledger import OPTIMIZER_PREFIXES, name_some

WEIGHTS, BUFFERS, OPTIMIZER, EXTRA_STATE = "weights", "buffers", "optimizer state", "extra state"
# Persistent buffers of megatron-core's modules, by their last name.
BUFFER_NAMES = ("expert_bias",)
OWN = ("random_state_",)  # keys of other layouts' generators; not asked for, not missed


def kind(key: str) -> str:
    """The class of a stored tensor or object: weights, buffers, optimizer state or extra state (of the kernels)."""
    if "_extra_state" in key:
        return EXTRA_STATE
    if key.startswith(OPTIMIZER_PREFIXES):
        return OPTIMIZER
    return BUFFERS if key.rpartition(".")[2] in BUFFER_NAMES else WEIGHTS


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


def without_missing_extra_state(wanted: dict[str, Any], stored: Iterable[str]) -> dict[str, Any]:
    """`wanted` less the kernels' `_extra_state` that is not stored; checkpoints of other kernels have less or more."""

    def keep(value: Any) -> bool:
        return kind(getattr(value, "key", "")) != EXTRA_STATE or set(keys_of(value)) <= set(stored)

    return {
        name: {key: inner for key, inner in value.items() if keep(inner)} if isinstance(value, dict) else value
        for name, value in wanted.items()
    }


def differences(wanted: dict[str, Any], stored: Iterable[str]) -> str | None:
    """What the ranks ask for and the checkpoint lacks, and what it has and no rank asks for, counted by class.

    None when nothing but extra state differs. The same on every rank; a collective call.
    """
    names = sorted(stored)
    number_of = {name: number for number, name in enumerate(names)}
    ours = set(keys_of(wanted))
    asked = torch.zeros(len(names), dtype=torch.int32, device=platform.device())
    asked[[number_of[key] for key in ours if key in number_of]] = 1
    torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
    unasked = [name for name, count in zip(names, asked.tolist(), strict=True) if not count]
    lists: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(lists, sorted(ours - number_of.keys()))
    missing = sorted({key for keys in lists for key in keys})
    said = [
        f"{verb} {counted}"
        for verb, keys in (("it lacks", missing), ("this run has no place for its", unasked))
        if (counted := by_class(keys))
    ]
    return "; ".join(said) or None


def by_class(keys: Iterable[str]) -> str:
    """"3 weights (a, b, c), 2 buffers (d, e)"; extra state and other layouts' generators are passed over."""
    classes: dict[str, list[str]] = {}
    for key in keys:
        if not key.startswith(OWN):
            classes.setdefault(kind(key), []).append(key)
    return ", ".join(
        f"{len(classes[name])} {name} ({name_some(classes[name])})"
        for name in (WEIGHTS, BUFFERS, OPTIMIZER)
        if name in classes
    )
