"""Process groups, random seeds and their teardown. The only reader of megatron-core's parallel_state."""

import contextlib
import os
import random
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bridge import platform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# TransformerConfig field -> argument of initialize_model_parallel; an absent field keeps megatron-core's default.
SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "hierarchical_context_parallel_sizes",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "pipeline_model_parallel_comm_backend",
    "hybrid_context_parallel",
)


def initialize(
    fields: Mapping[str, Any],
    *,
    seed: int = 1234,
    timeout_minutes: float = 30,
    num_distributed_optimizer_instances: int = 1,
) -> None:
    """Join the process group, make megatron-core's model-parallel groups and seed every random generator.

    `fields` holds TransformerConfig fields (`Routed.transformer`); only the parallel sizes and the choice of random
    state tracker are read. With RANK and WORLD_SIZE in the environment all ranks meet at MASTER_ADDR:MASTER_PORT;
    without them this is a world of one, with no rendezvous. A process group that another program made is used as it is.
    May be called again after `teardown()`.
    """
    import torch.distributed as dist

    platform.prepare()
    timeout = timedelta(minutes=timeout_minutes)
    if dist.is_initialized():
        pass  # whoever made it has chosen this process's device
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        platform.set_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(platform.backend(), timeout=timeout)
    else:
        platform.set_local_rank(0)
        dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    _make_groups(
        fields,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        num_distributed_optimizer_instances=num_distributed_optimizer_instances,
    )
    seed_generators(fields, seed=seed)


def _make_groups(fields: Mapping[str, Any], **options: Any) -> None:
    from megatron.core import parallel_state

    sizes = {name: fields[name] for name in SIZES if fields.get(name) is not None}
    sizes["virtual_pipeline_model_parallel_size"] = _chunks(fields)
    parallel_state.initialize_model_parallel(**sizes, **options)


def _chunks(fields: Mapping[str, Any]) -> int | None:
    """Model chunks on every pipeline stage; None for one, because megatron-core interleaves as soon as it is told any.

    megatron-core's configuration finds it in a layout by itself, its groups, which choose the schedule, do not.
    """
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    chunks = fields.get("virtual_pipeline_model_parallel_size") or 1
    spelled = fields.get("pipeline_model_parallel_layout")
    if spelled is not None:
        listed = PipelineParallelLayerLayout.parse_str_to_list(spelled) if isinstance(spelled, str) else spelled
        chunks = len(listed) // (fields.get("pipeline_model_parallel_size") or 1)
    return chunks if chunks > 1 else None


def seed_generators(fields: Mapping[str, Any], *, seed: int, keep_tracker: bool = False) -> None:
    """Seed Python, NumPy, torch and megatron-core's tracker.

    Seeds differ between pipeline stages and, for sharded weights, between tensor ranks; data ranks share theirs.
    keep_tracker: for a model that is built already: Transformer Engine's attention holds the tracker it found then.
    """
    import numpy
    import torch
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed, te_rng_tracker=bool(fields.get("use_te_rng_tracker", False)), force_reset_rng=not keep_tracker
    )


def teardown(*, keep_world: bool = False) -> None:
    """Destroy all process groups and CUDA graphs; a later `initialize()` starts afresh. Does nothing without groups.

    keep_world: only megatron-core's groups; the world is another program's.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer import cuda_graphs

    if dist.is_initialized():
        if cuda_graphs.CudaGraphManager.global_mempool is not None:  # graphs were captured
            cuda_graphs.delete_cuda_graphs()
        parallel_state.destroy_model_parallel()
        if not keep_world:
            dist.destroy_process_group()


def is_initialized() -> bool:
    """True between `initialize()` (or `fake()`) and `teardown()`."""
    import torch.distributed as dist

    return dist.is_initialized()


def has_groups() -> bool:
    """True when megatron-core's groups exist, whoever made them; a process group alone (`is_initialized`) has none."""
    from megatron.core import parallel_state

    return is_initialized() and parallel_state.model_parallel_is_initialized()


@contextlib.contextmanager
def single_process(fields: Mapping[str, Any] | None = None, *, seed: int = 1234) -> Iterator[None]:
    """A world of one for offline tools and tests, whatever the environment says.

    Parallel sizes in `fields` are ignored: one process holds the whole model.
    """
    kept = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        alone = {name: value for name, value in (fields or {}).items() if name not in SIZES}
        initialize(alone, seed=seed)
        yield
    finally:
        teardown()
        os.environ.update(kept)


@contextlib.contextmanager
def fake(world_size: int, rank: int, fields: Mapping[str, Any]) -> Iterator[None]:
    """Rank `rank` of a world of `world_size` that does not exist: its collectives return at once with wrong numbers.

    For models on the meta device, whose shapes are all that is asked of them.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    platform.prepare()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        _make_groups(fields, create_gloo_process_groups=False)
        seed_generators(fields, seed=0)
        yield
    finally:
        teardown()


def sizes() -> dict[str, int]:
    """The sizes that the process groups really have, by the field that asks for them."""
    from megatron.core import parallel_state

    replicas = {"with_context_parallel": True}
    sharded_over = parallel_state.get_data_parallel_world_size(**replicas, partial_data_parallel=True)
    return {
        "tensor_model_parallel_size": tensor_parallel_size(),
        "pipeline_model_parallel_size": pipeline_size(),
        "virtual_pipeline_model_parallel_size": virtual_pipeline_size(),
        "context_parallel_size": context_parallel_size(),
        "expert_model_parallel_size": expert_parallel_size(),
        "expert_tensor_parallel_size": expert_tensor_parallel_size(),
        "num_distributed_optimizer_instances": data_parallel_size(**replicas) // sharded_over,
    }


def rank() -> int:
    """This process's number in the world; 0 before `initialize()`."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the world; 1 before `initialize()`."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def data_parallel_rank(*, with_context_parallel: bool = False) -> int:
    """This process's number among those that see different data (and, if asked, different parts of a sequence)."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(with_context_parallel=with_context_parallel)


def data_parallel_size(*, with_context_parallel: bool = False) -> int:
    """Number of processes that see different data (times, if asked, those that share one sequence)."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size(with_context_parallel=with_context_parallel)


def tensor_parallel_rank() -> int:
    """This process's number among those that hold slices of the same layers."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank()


def tensor_parallel_size() -> int:
    """Number of slices every layer is cut into."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_parallel_group() -> "ProcessGroup":
    """The processes that hold slices of the same layers."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def context_parallel_group() -> "ProcessGroup":
    """The processes that hold parts of the same sequence."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def context_parallel_size() -> int:
    """Number of parts every sequence is cut into."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_world_size()


def pipeline_rank() -> int:
    """This process's pipeline stage, from 0."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank()


def pipeline_size() -> int:
    """Number of pipeline stages."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_world_size()


def virtual_pipeline_size() -> int:
    """Number of model chunks on every pipeline stage; megatron-core picks its schedule by it."""
    from megatron.core import parallel_state

    return parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1


def pipeline_group() -> "ProcessGroup":
    """The processes that hold the stages of one model."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_group()


def last_stage_rank() -> int:
    """The rank in the world of this pipeline's last stage."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_last_rank()


def expert_parallel_size() -> int:
    """Number of parts the experts of every layer are dealt into."""
    from megatron.core import parallel_state

    return parallel_state.get_expert_model_parallel_world_size()


def expert_tensor_parallel_size() -> int:
    """Number of slices every expert is cut into."""
    from megatron.core import parallel_state

    return parallel_state.get_expert_tensor_parallel_world_size()


def context_parallel_rank() -> int:
    """This process's number among those that hold parts of the same sequence."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_rank()


def is_pipeline_first_stage(*, vp_stage: int | None = None, vp_size: int | None = None) -> bool:
    """True where tokens are embedded: stage 0 and, of several model chunks on it, the first."""
    return pipeline_rank() == 0 and (vp_size is None or vp_stage == 0)


def is_pipeline_last_stage(*, vp_stage: int | None = None, vp_size: int | None = None) -> bool:
    """True where logits are computed: the last stage and, of several model chunks on it, the last."""
    return pipeline_rank() == pipeline_size() - 1 and (vp_size is None or vp_stage == vp_size - 1)


def all_gather(value: Any) -> list[Any]:
    """Every rank's `value` (picklable), by rank. A collective."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values
