"""What a checkpoint holds: weights under canonical names, optimizer state per parameter, generators, and as plain data
progress, schedule, layout and settings of the run that wrote it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config, unwrap_model

from bridge import parallel
from bridge.checkpoint.optimizer_state import OptimizerState
from bridge.errors import shown
from bridge.optim import schedule
from bridge.parallel import Axis
from bridge.platform.random_state import random_state

FORMAT = 2  # 1 kept optimizer state in the shape of the optimizer that wrote it
RANDOM_STATE = "random_state_"

# fully_reshardable stores optimizer state per parameter; megatron-core 0.16.1 cannot load its own default format again.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}


class Position(NamedTuple):
    """How far a run has come. step: optimizer steps, `skipped` of them left out, `nonfinite` with a loss or gradient
    that is not finite, `spikes` with a sudden loss. recent_losses: what the next spike is measured against.
    data: identity of the samples that `consumed_samples` counts. consumed_tokens: theirs, padding left out.
    best: the lowest or highest value so far of what best_metric names, of the evaluation after best_step;
    worse_evaluations: how many there were since."""

    step: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    data: str = ""
    nonfinite: int = 0
    spikes: int = 0
    recent_losses: tuple[float, ...] = ()
    consumed_tokens: int | None = None
    best_metric: str = ""
    best: float | None = None
    best_step: int = 0
    worse_evaluations: int = 0


class Trainable(NamedTuple):
    """What a checkpoint saves and restores in place. model: this rank's chunks, wrapped or not."""

    model: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def weights(model: Sequence[Any]) -> dict[str, Any]:
    """Sharded weights of every chunk of this rank, wrapped or not, as model0, model1, ..."""
    chunks = unwrap_model(list(model))
    return {f"model{index}": chunk.sharded_state_dict(metadata=dict(METADATA)) for index, chunk in enumerate(chunks)}


def to_save(state: Trainable, progress: Position) -> dict[str, Any]:
    """All that a checkpoint holds, as the sharded state dict of this rank. A collective call."""
    sharded = weights(state.model)
    optimizer = OptimizerState(state.optimizer, sharded, metadata=METADATA, is_loading=False)
    return sharded | {
        "optimizer_state": optimizer.tensors,
        "optimizer": optimizer.plain(),
        "random_state": random_state_of_rank(),
        "scheduler": {"num_steps": state.scheduler.num_steps},
        "progress": progress._asdict(),
        "layout": layout(state),
        "settings": schedule.settings(state.scheduler, state.optimizer),
        "format": FORMAT,
    }


def layout(state: Trainable) -> dict[str, Any]:
    """The layout and precision of a run under the names of megatron-core's configurations, as plain values.

    Sizes of experts only where there are any.
    """
    transformer, virtual = get_model_config(state.model[0]), parallel.virtual_pipeline_size()
    experts = {
        "expert_model_parallel_size": parallel.size("ep"),
        "expert_tensor_parallel_size": parallel.size("etp"),
    }
    return {
        "tensor_model_parallel_size": parallel.size("tp"),
        "pipeline_model_parallel_size": parallel.size("pp"),
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "context_parallel_size": parallel.size("cp"),
        **(experts if transformer.num_moe_experts else {}),
        "data_parallel_size": parallel.size("dp"),
        "use_distributed_optimizer": bool(state.model[0].ddp_config.use_distributed_optimizer),
        "params_dtype": str(transformer.params_dtype).removeprefix("torch."),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """As in: lr 0.01 -> 0.02, min_lr 0 -> 0.001. Names that both have with different values; empty without any."""
    return ", ".join(
        f"{name} {shown(before[name])} -> {shown(now[name])}"
        for name in now
        if before.get(name, now[name]) != now[name]
    )


def random_state_of_rank() -> ShardedObject:
    """This rank's generators, under a key that only the same rank of the same layout asks for."""
    axes: tuple[Axis, ...] = ("tp", "pp", "cp", "ep")
    sizes = "".join(f"{axis}{parallel.size(axis)}" for axis in axes)
    return ShardedObject(f"{RANDOM_STATE}{sizes}", random_state(), (parallel.size(),), (parallel.rank(),))
