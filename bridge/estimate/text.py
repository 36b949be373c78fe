"""The dry run's text."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from bridge import parallel, platform
from bridge.config import layout
from bridge.config.layout import Layout
from bridge.config.run_config import RunConfig
from bridge.estimate import pieces
from bridge.estimate.stages import Memory, kernels, memory
from bridge.models import gpt
from bridge.training import flops


class Parameters(NamedTuple):
    """Of the whole model with its true vocabulary. `active`: those a token meets; fewer than `total` with experts."""

    total: int
    active: int


def parameters(config: RunConfig) -> Parameters:
    """Exact counts, of a whole model without vocabulary padding."""
    routed = dataclasses.replace(config, parallelism={}).routed()
    routed = routed._replace(gpt=routed.gpt | {"make_vocab_size_divisible_by": 1})
    alone = Layout(1, 1, 1, 1, 1, 1, 1, 1)
    model = pieces.of(routed, alone)
    ((whole,),) = pieces.chunks(model, routed.transformer, alone)
    weights = model.weights(whole, stages=1, ep=1)
    total, in_experts = (
        sum(weight.size for weight in weights if weight.expert is not None or not only) for only in (False, True)
    )
    if not in_experts:
        return Parameters(total, total)
    visited = in_experts * model.config.moe_router_topk // model.config.num_moe_experts
    return Parameters(total, total - in_experts + visited)
