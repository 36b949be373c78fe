"""`plan=true`: the legal layouts of a model on a given number of GPUs with a given memory, best estimated first.

Legal is what bridge.config.layout.check lets pass. Only layouts that somebody might want are tried: tensor parallelism
within a node, context parallelism for sequences of at least CONTEXT tokens on each rank.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from bridge.config import layout, mcore_fields
from bridge.config.divisibility import divisors
from bridge.config.layout import Layout
from bridge.config.routing import Routed
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.estimate import activations, pieces, speed, stages, state
from bridge.estimate.pieces import Chunk, Pieces
from bridge.estimate.speed import Cluster, Costs
from bridge.estimate.state import State

CONTEXT = 4096
MICRO_BATCHES = (1, 2, 4, 8)
CHUNKS = (2, 3, 4, 5, 6, 8, 10)
FREE = 0.05  # of the memory, for what its allocator cannot use

Fields = dict[str, Any]

# What a plan decides in the section `parallelism`; the rest of it stays as it is.
DECIDED = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_last_pipeline_stage",
    "overlap_p2p_comm",
    "batch_p2p_comm",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "recompute_granularity",
    "recompute_modules",
    "recompute_method",
    "recompute_num_layers",
)
UNDIVIDED: Fields = {name: mcore_fields.defaults()[name] for name in DECIDED}
OF_DATA_PARALLELISM = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
OF_THE_OPTIMIZER = ("use_distributed_optimizer", "overlap_param_gather")


class Plan(NamedTuple):
    """One layout that fits. `fields` of the section `parallelism` differ from UNDIVIDED; `memory` in bytes on the
    fullest process, the CUDA context and NCCL included."""

    shape: Layout
    fields: Fields
    micro_batch_size: int
    memory: float
    costs: Costs


class _Legal(NamedTuple):
    """A layout that the rules let pass. stages: each one's chunks; static: what each one holds for the whole run."""

    routed: Routed
    shape: Layout
    fields: Fields
    model: Pieces
    stages: list[list[Chunk]]
    static: list[State]


class _Smallest(NamedTuple):
    memory: float
    shape: Layout


def cluster_of(config: RunConfig, *, world_size: int) -> Cluster:
    """Nodes as train.num_nodes says; one node is taken for several where it has more GPUs than NVLink usually joins."""
    nodes = config.train.num_nodes
    return Cluster(world_size, world_size // nodes if nodes > 1 else min(world_size, speed.GPUS_PER_NODE))


def plans(config: RunConfig, *, cluster: Cluster) -> list[Plan]:
    """The fastest variant of each division that fits, fastest first. Raises ConfigError when there is none."""
    base = config.routed
    room = config.plan_memory_gib * 2**30 * (1 - FREE)
    best: dict[tuple[int, ...], Plan] = {}
    smallest: _Smallest | None = None
    refused: ConfigError | None = None
    for fields in _divisions(config, base, cluster):
        for size in [config.train.micro_batch_size] if config.train.micro_batch_size else MICRO_BATCHES:
            try:
                legal = _legal(config, base, fields, size, cluster)
                plan = _fitted(config, legal, size, room, cluster)
            except ConfigError as error:
                refused = refused or error
                continue
            key = legal.shape._replace(vpp=1)
            if isinstance(plan, _Smallest):
                smallest = min(smallest or plan, plan)
            elif key not in best or plan.costs.total < best[key].costs.total:
                best[key] = plan
    if best:
        return sorted(best.values(), key=lambda plan: (plan.costs.total, plan.memory))
    if smallest is None:
        raise refused or ConfigError("parallelism: no layout was found")
    raise ConfigError(_nothing_fits(config, smallest, cluster))


def overrides(plan: Plan, config: RunConfig) -> Fields:
    """Full keys and values that make the plan's configuration out of `config`."""
    wanted = UNDIVIDED | plan.fields
    changed = {
        f"parallelism.{name}": value
        for name, value in wanted.items()
        if value != config.parallelism.get(name, UNDIVIDED[name])
    }
    if plan.micro_batch_size != config.train.micro_batch_size:
        changed["train.micro_batch_size"] = plan.micro_batch_size
    return changed


def _nothing_fits(config: RunConfig, smallest: _Smallest, cluster: Cluster) -> str:
    sizes = ", ".join(f"{name.upper()} {getattr(smallest.shape, name)}" for name in ("tp", "pp", "cp", "ep", "dp"))
    return (
        f"plan_memory_gib: no layout of this model fits {cluster.world} GPUs of {config.plan_memory_gib:g} GiB; the "
        f"smallest found needs {smallest.memory / (1 - FREE) / 2**30:.0f} GiB each ({sizes}); set more GPUs "
        f"(train.num_devices), a larger plan_memory_gib or a shorter data.sequence_length"
    )


def _divisions(config: RunConfig, base: Routed, cluster: Cluster) -> Iterator[Fields]:
    """Every division worth a look; most of them are not legal."""
    layers, experts = base.transformer["num_layers"], base.get("num_moe_experts")
    spare = max(1, config.data["sequence_length"] // CONTEXT)
    for tp, cp in itertools.product(divisors(cluster.per_node), divisors(cluster.world)):
        if cp > spare or cluster.world % (tp * cp):
            continue
        for pp in divisors(cluster.world // (tp * cp)):
            for ep in divisors(experts) if experts else [1]:
                for etp in sorted({1, tp}) if ep > 1 else [None]:
                    if pp > layers or cluster.world % (pp * ep * (etp or tp)):
                        continue
                    sizes = {
                        "tensor_model_parallel_size": tp,
                        "sequence_parallel": tp > 1,
                        "pipeline_model_parallel_size": pp,
                        "context_parallel_size": cp,
                        "expert_model_parallel_size": ep,
                        "expert_tensor_parallel_size": etp,
                    }
                    yield from (sizes | schedule for schedule in _schedules(layers, pp))


def _schedules(layers: int, pp: int) -> Iterator[Fields]:
    """With every number of chunks; with fewer layers on the last stage, which has the loss, if they do not divide."""
    if layers % pp == 0:
        yield {}
        for chunks in CHUNKS if pp > 1 else ():
            if layers // pp % chunks == 0:
                sending = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
                yield {"virtual_pipeline_model_parallel_size": chunks, **sending}
    elif (last := layers - -(-layers // pp) * (pp - 1)) > 0:
        yield {"num_layers_in_last_pipeline_stage": last}


def _legal(config: RunConfig, base: Routed, fields: Fields, micro_batch_size: int, cluster: Cluster) -> _Legal:
    """`fields` with a sharded optimizer whose messages overlap, wherever that is legal."""
    ranks = cluster.world // fields["tensor_model_parallel_size"] // fields["pipeline_model_parallel_size"]
    whole = dict.fromkeys(OF_DATA_PARALLELISM, False)
    ways = [whole]
    if ranks > 1 and base.get("optimizer") == "adam":
        ways = [dict.fromkeys(OF_DATA_PARALLELISM, True), whole | {"use_distributed_optimizer": True}]
    for way in ways:
        routed = _routed(base, fields | way)
        try:
            shape = _check(config, routed, micro_batch_size, cluster)
            break
        except ConfigError:
            if way is ways[-1]:
                raise
    model = pieces.of(routed, shape)
    cut = pieces.chunks(model, routed.transformer, shape)
    width = model.norm[0].width
    static = [
        state.rough([model.sizes(chunk, ep=shape.ep) for chunk in chunks], routed, shape, width=width) for chunks in cut
    ]
    return _Legal(routed, shape, fields | way, model, cut, static)


def _check(config: RunConfig, routed: Routed, micro_batch_size: int, cluster: Cluster) -> Layout:
    train = dataclasses.replace(config.train, micro_batch_size=micro_batch_size)
    length = config.data["sequence_length"]
    return layout.check(routed, world_size=cluster.world, sequence_length=length, train=train)


def _routed(base: Routed, fields: Fields) -> Routed:
    data = {name: fields[name] for name in OF_DATA_PARALLELISM}
    wanted = {name: value for name, value in (UNDIVIDED | fields).items() if name not in data}
    kept = {name: value for name, value in base.transformer.items() if name not in wanted}
    set_ = {name: value for name, value in wanted.items() if value is not None}
    optimizer = {name: data[name] for name in OF_THE_OPTIMIZER}
    return dataclasses.replace(base, transformer=kept | set_, ddp=base.ddp | data, optimizer=base.optimizer | optimizer)


def _recomputations(base: Routed) -> list[Fields]:
    """From none to all, by what they cost."""
    experts = base.get("num_moe_experts") is not None
    mlp = "moe" if experts else "mlp"
    latent = base.get("multi_latent_attention")
    modules = [["mla_up_proj"], ["mla_up_proj", mlp]] if latent else [[mlp]]
    selective = [{"recompute_granularity": "selective", "recompute_modules": chosen} for chosen in modules]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return [{}, *selective, full]


def _fitted(config: RunConfig, legal: _Legal, micro_batch_size: int, room: float, cluster: Cluster) -> Plan | _Smallest:
    """With as little recomputation as fits; if nothing does, what it needs at least."""
    shape = legal.shape
    micro_batches = config.train.global_batch_size // (micro_batch_size * shape.dp)
    for again in _recomputations(legal.routed):
        routed = _routed(legal.routed, legal.fields | again)
        how = activations.use(
            routed,
            shape,
            sequence_length=config.data["sequence_length"],
            micro_batch_size=micro_batch_size,
            fused=True,
        )
        layers = stages.layers_of(legal.model, how)
        peaks = [
            stages.activation_peak(legal.model, routed, how, chunks, layers, stage=stage, micro_batches=micro_batches)
            for stage, chunks in enumerate(legal.stages)
        ]
        memory = stages.OVERHEAD + max(
            held.weights + held.gradients + held.optimizer + max(peak.total, held.step)
            for held, peak in zip(legal.static, peaks, strict=True)
        )
        if memory <= room:
            _check(config, routed, micro_batch_size, cluster)
            seconds = speed.costs(
                legal.model, routed, how, legal.stages, layers, micro_batches=micro_batches, cluster=cluster
            )
            return Plan(shape, legal.fields | again, micro_batch_size, memory, seconds)
    return _Smallest(memory, shape)
