"""The process groups a model needs: made from its sizes, or found and checked against them."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from bridge import parallel
from bridge.config import layout
from bridge.config.layout import pipeline
from bridge.config.routing import Routed
from bridge.errors import ConfigError

SIZES = {
    "tensor_model_parallel_size": parallel.tensor_parallel_size,
    "pipeline_model_parallel_size": parallel.pipeline_size,
    "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_size,
    "context_parallel_size": parallel.context_parallel_size,
}
EXPERT_SIZES = {
    "expert_model_parallel_size": parallel.expert_parallel_size,
    "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
}


def num_processes() -> int | None:
    """Processes of this job: of the process group, else as torchrun says; None when there is neither."""
    if parallel.is_initialized():
        return parallel.world_size()
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


@contextmanager
def joined(routed: Routed, *, seed: int = 1234) -> Iterator[None]:
    """The block runs with process groups of the sizes in `routed`; they stay, but those made here go if it fails."""
    had_world = parallel.is_initialized()
    made = join(routed, seed=seed)
    try:
        yield
    except BaseException:
        if made:
            parallel.teardown(keep_world=had_world)
        raise


def join(routed: Routed, *, seed: int = 1234) -> bool:
    """Make the process groups of the sizes in `routed` (True), or check that those there are have them (False).

    Raises ConfigError naming the size that differs, or that the number of processes cannot give.
    """
    if parallel.has_groups():
        _check(routed)
        return False
    ranks = num_processes() or 1
    needed = math.prod(_asked(routed, name) for name in SIZES if not name.startswith("virtual"))
    if ranks % needed:
        raise ConfigError(
            f"parallelism: needs a multiple of {needed} processes, there are {ranks}; start with torchrun"
        )
    layout.derive(routed, world_size=ranks)
    parallel.initialize(routed.transformer, seed=seed)
    return True


def _check(routed: Routed) -> None:
    # A model without experts runs in groups made for one that has them.
    has_experts = routed.get("num_moe_experts") is not None
    expert_sizes = {name: size for name, size in EXPERT_SIZES.items() if has_experts or name in routed.origin}
    for name, size in (SIZES | expert_sizes).items():
        asked = _asked(routed, name)
        if size() != asked:
            raise ConfigError(f"parallelism.{name}: {asked}, but this process group has {size()}; set that")


def _asked(routed: Routed, name: str) -> int:
    """The size in `routed`, or megatron-core's for one that is not set."""
    if name == "virtual_pipeline_model_parallel_size":
        return pipeline.chunks(routed)
    default = routed.get("tensor_model_parallel_size") if name == "expert_tensor_parallel_size" else 1
    size: int = routed.get(name, default)
    return size
