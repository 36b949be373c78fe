"""What a checkpoint holds: weights under canonical names, optimizer state per parameter, generators, progress."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from bridge import parallel
from bridge.platform.random_state import random_state

FORMAT = 1

# fully_reshardable stores optimizer state per parameter; megatron-core 0.16.1 cannot load its own default format again.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}


class Progress(NamedTuple):
    """How far a run has come. step: optimizer steps, `skipped` of them left out, `nonfinite` with a loss or gradient
    that is not finite, `spikes` with a sudden loss. recent_losses: what the next spike is measured against.
    data: identity of the samples that `consumed_samples` counts."""

    step: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    data: str = ""
    nonfinite: int = 0
    spikes: int = 0
    recent_losses: tuple[float, ...] = ()


class Trainable(NamedTuple):
    """What a checkpoint saves and restores in place. model: this rank's chunks, wrapped or not."""

    model: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def weights(model: Sequence[Any]) -> dict[str, Any]:
    """Sharded weights of every chunk of this rank, wrapped or not, as model0, model1, ..."""
    chunks = unwrap_model(list(model))
    return {f"model{index}": chunk.sharded_state_dict(metadata=dict(METADATA)) for index, chunk in enumerate(chunks)}


def random_state_of_rank() -> ShardedObject:
    """This rank's generators, under a key that only the same rank of the same layout asks for."""
    layout = f"tp{parallel.tensor_parallel_size()}pp{parallel.pipeline_size()}cp{parallel.context_parallel_size()}"
    return ShardedObject(f"random_state_{layout}", random_state(), (parallel.world_size(),), (parallel.rank(),))
