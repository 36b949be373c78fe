"""What a model consists of, told by a meta-device model: nothing is allocated."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from bridge import parallel
from bridge.config.annotation import DTYPES
from bridge.config.routing import Routed, route
from bridge.models import family, gpt
from bridge.weights import shards
from bridge.weights.ledger import Move, plan
from bridge.weights.table import Table


class Skeleton(NamedTuple):
    """A `model` section, its routed form, its family's table in one spelling, and what a checkpoint consists of."""

    section: dict[str, Any]
    routed: Routed
    spelling: str
    table: Table
    moves: list[Move]
    object_keys: list[str]  # megatron-core's load expects these beside the tensors; they are empty


def skeleton(section: Mapping[str, Any], *, hf_names: Collection[str] = (), spelling: str = "") -> Skeleton:
    """The skeleton of a `model` section, in a process without process groups. Raises ConfigError, ConversionError.

    The table is in the `spelling` given, or in the one that has these `hf_names`.
    """
    routed = route({"model": section})
    with parallel.single_process(routed.transformer):
        model = gpt.build(routed, meta=True)
        targets, object_keys = shards.targets(model), shards.object_keys(model)
    its_family = family.by_name(routed.family)
    spelling = spelling or its_family.spelling(section, hf_names)
    table = its_family.table(section, spelling=spelling)
    moves = plan(table, targets, vocab_size=routed.gpt["vocab_size"])
    return Skeleton(dict(section), routed, spelling, table, moves, object_keys)


def torch_dtype(name: str | None) -> torch.dtype | None:
    """bf16 -> torch.bfloat16; None stays None."""
    return None if name is None else getattr(torch, DTYPES[name])
