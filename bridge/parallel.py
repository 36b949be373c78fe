"""Process groups, random seeds and their teardown. The only reader of megatron-core's parallel_state."""

import contextlib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from bridge import platform
from bridge.config import layout
from bridge.config.layout import pipeline
from bridge.config.routing import Routed
from bridge.errors import ConfigError

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


def num_processes() -> int | None:
    """Processes of this job: of the process group, else as torchrun says; None when there is neither."""
    if is_initialized():
        return size()
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def join(routed: Routed, *, seed: int = 1234) -> bool:
    """Make the process groups that `routed` asks for (True), or check that those there are have its sizes (False).

    Raises ConfigError for a value that this platform cannot honour, a size that differs, or one that the number of
    processes cannot give. `teardown` undoes it.
    """
    platform.check(routed.given, routed.origin)
    if has_groups():
        _check_sizes(routed)
        return False
    ranks = num_processes() or 1
    needed = math.prod(routed.get(f"{axis}_parallel_size") for axis in ("tensor_model", "pipeline_model", "context"))
    if ranks % needed:
        raise ConfigError(
            f"parallelism: {ranks} {'process' if ranks == 1 else 'processes'}, but the layout needs a multiple of "
            f"{needed}; start that many with torchrun"
        )
    layout.derive(routed, world_size=ranks)
    instances = routed.get("num_distributed_optimizer_instances")
    initialize(routed.transformer, seed=seed, num_distributed_optimizer_instances=instances)
    return True


@contextlib.contextmanager
def joined(routed: Routed, *, seed: int = 1234) -> Iterator[None]:
    """The block runs in the groups of `join`; they stay, but those made here go if it fails."""
    had_world = is_initialized()
    made = join(routed, seed=seed)
    try:
        yield
    except BaseException:
        if made:
            teardown(keep_world=had_world)
        raise


def _check_sizes(routed: Routed) -> None:
    """Raise ConfigError unless the groups there are have the sizes of `routed`."""
    for name, found in sizes().items():
        # A model without experts runs in groups made for one that has them.
        of_others = name.startswith("expert_") and routed.get("num_moe_experts") is None and name not in routed.origin
        asked = _asked(routed, name)
        if found != asked and not of_others and name != "num_distributed_optimizer_instances":
            raise ConfigError(f"parallelism.{name}: {asked}, but this process group has {found}; set that")


def _asked(routed: Routed, name: str) -> int:
    if name == "virtual_pipeline_model_parallel_size":
        return pipeline.chunks(routed)
    if name == "expert_tensor_parallel_size":
        return routed.number(name, routed.get("tensor_model_parallel_size")).value
    return routed.number(name).value


def initialize(
    fields: Mapping[str, Any],
    *,
    seed: int = 1234,
    timeout_minutes: float = 30,
    num_distributed_optimizer_instances: int = 1,
) -> None:
    """What `join` does when all is checked: join the process group, make megatron-core's model-parallel groups and seed
    every random generator.

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
    with _one_group_for_a_rank_alone() if platform.backend() == "gloo" else contextlib.nullcontext():
        parallel_state.initialize_model_parallel(**sizes, **options)


@contextlib.contextmanager
def _one_group_for_a_rank_alone() -> Iterator[None]:
    """Inside, megatron-core's groups that hold one and the same rank alone are one group: a process alone has twenty.

    Each takes gloo 2 ms, three threads and their wake-ups; NCCL starts nothing before a group is used. Larger groups
    stay apart, as messages of two of them could be taken for each other's.
    """
    from megatron.core import parallel_state

    state: Any = parallel_state
    create = state.create_group
    alone: dict[int, Any] = {}

    def create_or_share(ranks: Sequence[int], *others: Any, **named: Any) -> Any:
        if len(ranks) != 1:
            return create(ranks, *others, **named)
        if ranks[0] not in alone:
            alone[ranks[0]] = create(ranks, *others, **named)
        return alone[ranks[0]]

    state.create_group = create_or_share
    try:
        yield
    finally:
        state.create_group = create


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
        platform.forget_models()
        if not keep_world:
            dist.destroy_process_group()


def is_initialized() -> bool:
    """True between `join` (or `fake`) and `teardown`, and where another program made a process group."""
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

    sharded_over = parallel_state.get_data_parallel_world_size(with_context_parallel=True, partial_data_parallel=True)
    return {
        "tensor_model_parallel_size": size("tp"),
        "pipeline_model_parallel_size": size("pp"),
        "virtual_pipeline_model_parallel_size": virtual_pipeline_size(),
        "context_parallel_size": size("cp"),
        "expert_model_parallel_size": size("ep"),
        "expert_tensor_parallel_size": size("etp"),
        "num_distributed_optimizer_instances": size("dp_cp") // sharded_over,
    }


Axis = Literal["world", "tp", "pp", "cp", "dp", "dp_cp", "ep", "etp"]
# Axis -> megatron-core's function for the group of processes along it, and its arguments.
_GROUPS: dict[Axis, tuple[str, dict[str, Any]]] = {
    "tp": ("get_tensor_model_parallel_group", {}),  # slices of the same layers
    "pp": ("get_pipeline_model_parallel_group", {}),  # stages of one model
    "cp": ("get_context_parallel_group", {}),  # parts of the same sequence
    "dp": ("get_data_parallel_group", {}),  # different data
    "dp_cp": ("get_data_parallel_group", {"with_context_parallel": True}),  # different data, and parts of a sequence
    "ep": ("get_expert_model_parallel_group", {}),  # different experts of the same layers
    "etp": ("get_expert_tensor_parallel_group", {}),  # slices of the same experts
}


def group(axis: Axis) -> "ProcessGroup":
    """The processes along `axis` that this one belongs to. Raises AssertionError before there are groups."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if axis == "world":
        assert dist.group.WORLD is not None, "no process group"
        return dist.group.WORLD
    name, options = _GROUPS[axis]
    found: ProcessGroup = getattr(parallel_state, name)(**options)
    return found


def rank(axis: Axis = "world") -> int:
    """This process's number along `axis`, from 0; in the world 0 before there is one."""
    import torch.distributed as dist

    return dist.get_rank(group(axis)) if axis != "world" or dist.is_initialized() else 0


def size(axis: Axis = "world") -> int:
    """Processes along `axis`; in the world 1 before there is one."""
    import torch.distributed as dist

    return dist.get_world_size(group(axis)) if axis != "world" or dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def virtual_pipeline_size() -> int:
    """Number of model chunks on every pipeline stage; megatron-core picks its schedule by it."""
    from megatron.core import parallel_state

    return parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1


def last_stage_rank() -> int:
    """The rank in the world of this pipeline's last stage."""
    import torch.distributed as dist

    return dist.get_process_group_ranks(group("pp"))[-1]


def is_pipeline_first_stage(*, vp_stage: int | None = None, vp_size: int | None = None) -> bool:
    """True where tokens are embedded: stage 0 and, of several model chunks on it, the first."""
    return rank("pp") == 0 and (vp_size is None or vp_stage == 0)


def is_pipeline_last_stage(*, vp_stage: int | None = None, vp_size: int | None = None) -> bool:
    """True where logits are computed: the last stage and, of several model chunks on it, the last."""
    return rank("pp") == size("pp") - 1 and (vp_size is None or vp_stage == vp_size - 1)


def all_gather(value: Any) -> list[Any]:
    """Every rank's `value` (picklable), by rank. A collective."""
    if size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * size()
    torch.distributed.all_gather_object(values, value)
    return values
