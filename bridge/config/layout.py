"""The rules a parallel layout must meet, on plain numbers: no torch, no megatron-core.

Each is a rule that megatron-core 0.16.1 asserts somewhere in a worker, or computes wrong results without. Every message
gives the formula with its numbers and the nearest legal values.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from bridge.config import divisibility
from bridge.config.divisibility import Number, divisors, either, nearest
from bridge.config.routing import Routed
from bridge.config.schema import Train
from bridge.errors import ConfigError


class Layout(NamedTuple):
    """How many processes share what. world_size = tp * pp * cp * dp."""

    tp: int  # each weight matrix
    pp: int  # the layers
    cp: int  # each sequence
    ep: int  # the experts
    etp: int  # each expert's weight matrices
    dp: int  # the batch
    vpp: int  # chunks of layers per process; 1: no interleaving
    world_size: int


class Batch(NamedTuple):
    """Batch sizes in sequences, the sequence in tokens. rampup: [start, increment, samples]."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    rampup: Sequence[int] | None


class _Fields:
    """Reads `Routed` by field name."""

    def __init__(self, routed: Routed) -> None:
        self._origin = routed.origin
        self._values = {**routed.optimizer, **routed.ddp, **routed.gpt, **routed.transformer}

    def get(self, name: str, default: Any = None) -> Any:
        """The value the user set, else `default`, which is megatron-core's."""
        value = self._values.get(name)
        return default if value is None else value

    def key(self, name: str) -> str:
        return self._origin.get(name, name)

    def number(self, name: str, default: int = 1) -> Number:
        return Number(name, self.get(name, default), self._origin.get(name, ""))


def check(
    routed: Routed,
    *,
    world_size: int,
    sequence_length: int,
    train: Train,
) -> Layout:
    """The layout of `routed` on `world_size` processes. Raises ConfigError on the first rule that is broken.

    sequence_length in tokens.
    """
    fields = _Fields(routed)
    _check_sizes(fields)
    layout = derive(routed, world_size=world_size)
    micro_batch_size = train.sequences_per_pass(layout.dp)
    batch = Batch(sequence_length, train.global_batch_size, micro_batch_size, train.rampup_batch_size)
    _check_model(fields, batch)
    _check_tensor_parallel(fields, layout)
    _check_sequence(fields, layout, batch)
    _check_pipeline(fields, layout)
    _check_point_to_point(fields, layout)
    _check_layers(fields, layout)
    _check_experts(fields, layout)
    _check_optimizer(fields, layout)
    _check_batch(layout, batch)
    _check_microbatches(fields, layout, batch)
    return layout


def check_model(routed: Routed, *, world_size: int) -> Layout:
    """The rules of `check` that need no batch, for programs with a training loop of their own."""
    fields = _Fields(routed)
    _check_sizes(fields)
    layout = derive(routed, world_size=world_size)
    _check_heads(fields)
    _check_tensor_parallel(fields, layout)
    _check_interleaving(fields, layout)
    _check_point_to_point(fields, layout)
    _check_layers(fields, layout)
    _check_experts(fields, layout)
    return layout


def derive(routed: Routed, *, world_size: int) -> Layout:
    """The sizes alone, with DP as what is left. Raises ConfigError when `world_size` cannot be divided as asked."""
    fields = _Fields(routed)
    processes = Number("processes", world_size, "train.num_devices")
    tp = fields.number("tensor_model_parallel_size")
    pp = fields.number("pipeline_model_parallel_size")
    cp = fields.number("context_parallel_size")
    ep = fields.number("expert_model_parallel_size")
    etp = fields.number("expert_tensor_parallel_size", tp.value)
    divisibility.require(processes, by=(tp, pp, cp))
    if fields.get("num_moe_experts") is not None:
        divisibility.require(processes, by=(etp, ep, pp))
    dp = world_size // (tp.value * pp.value * cp.value)
    return Layout(tp.value, pp.value, cp.value, ep.value, etp.value, dp, _chunks(fields, pp), world_size)


_POSITIVE = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_distributed_optimizer_instances",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
)


def _check_sizes(fields: _Fields) -> None:
    for name in _POSITIVE:
        if fields.get(name, 1) < 1:
            raise ConfigError(f"{fields.key(name)}: {fields.get(name)} is not positive; set a whole number from 1 up")


def _check_heads(fields: _Fields) -> None:
    heads = fields.number("num_attention_heads")
    if fields.get("kv_channels") is None:
        divisibility.require(fields.number("hidden_size"), by=[heads])
    divisibility.require(heads, by=[fields.number("num_query_groups")])


def _check_model(fields: _Fields, batch: Batch) -> None:
    _check_heads(fields)
    length, longest = batch.sequence_length, fields.get("max_sequence_length")
    if length > longest:
        raise ConfigError(
            f"data.sequence_length: sequence_length <= max_sequence_length must hold, but {length} > {longest}; "
            f"set data.sequence_length to {longest} or less, or model.max_sequence_length to {length} or more"
        )


def _check_tensor_parallel(fields: _Fields, layout: Layout) -> None:
    tp, heads = fields.number("tensor_model_parallel_size"), fields.number("num_attention_heads")
    divisibility.require(heads, by=[tp])
    groups = fields.get("num_query_groups", heads.value)
    if groups % layout.tp and layout.tp % groups:
        legal = [size for size in divisors(heads.value) if groups % size == 0 or size % groups == 0]
        raise ConfigError(
            f"{fields.key(tp.name)}: num_query_groups % TP or TP % num_query_groups must be 0, but "
            f"{groups} % {layout.tp} = {groups % layout.tp} and {layout.tp} % {groups} = {layout.tp % groups}; "
            f"set {fields.key(tp.name)} to {either(nearest(legal, layout.tp))}"
        )
    divisibility.require(fields.number("ffn_hidden_size", 4 * fields.get("hidden_size")), by=[tp])
    divisibility.require(fields.number("moe_shared_expert_intermediate_size", layout.tp), by=[tp])
    if fields.get("multi_latent_attention", False) and layout.tp > 1 and not fields.get("sequence_parallel", False):
        # The down-projections are on every rank: without it each would add up the gradient of the whole sequence.
        raise ConfigError(
            f"parallelism.sequence_parallel: must be true for latent attention with TP > 1, but it is false with "
            f"TP = {layout.tp}; set it to true"
        )
    if fields.get("sequence_parallel", False) and layout.tp == 1:
        smallest = divisors(heads.value)[1:2]
        more = f", or parallelism.tensor_model_parallel_size to {either(smallest)}" if smallest else ""
        raise ConfigError(
            f"{fields.key('sequence_parallel')}: TP > 1 must hold, but TP = 1; set it to false{more}",
        )


def _check_sequence(fields: _Fields, layout: Layout, batch: Batch) -> None:
    length = Number("sequence_length", batch.sequence_length, "data.sequence_length")
    cp = fields.number("context_parallel_size")
    if layout.cp > 1:
        # Every rank takes one chunk from the front and one from the back, so that causal attention is even work.
        divisibility.require(length, by=(Number("2", 2, movable=False), cp))
    if fields.get("sequence_parallel", False):
        divisibility.require(length, by=(cp, fields.number("tensor_model_parallel_size")))


def _chunks(fields: _Fields, pp: Number) -> int:
    """Chunks of layers per process: as set, or as many as pipeline_model_parallel_layout spells out."""
    spelled = fields.get("pipeline_model_parallel_layout")
    asked = fields.number("virtual_pipeline_model_parallel_size")
    if spelled is None:
        return asked.value
    stages = _count_stages(spelled)
    divisibility.require(Number("stages of pipeline_model_parallel_layout", stages, movable=False), by=[pp])
    if asked.key and fields.get(asked.name) not in (None, stages // pp.value):
        raise ConfigError(
            f"{asked.key}: stages of pipeline_model_parallel_layout / PP = VPP must hold, but {stages} / {pp.value} = "
            f"{stages // pp.value}, not {asked.value}; set it to {stages // pp.value}"
        )
    return stages // pp.value


def _count_stages(spelled: str | list[Any]) -> int:
    """Stages in a layout such as `Et*3|(tt|)*2,L`: megatron-core unrolls (..)*n, then x*n, and splits at `|`."""
    if isinstance(spelled, list):
        return len(spelled)
    unrolled = spelled.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        unrolled = re.sub(repeated, lambda found: found.group(1) * int(found.group(2)), unrolled)
    return len(unrolled.split("|"))


def _check_interleaving(fields: _Fields, layout: Layout) -> None:
    if layout.vpp > 1 and layout.pp == 1:
        raise ConfigError(
            f"{fields.key('virtual_pipeline_model_parallel_size')}: PP > 1 must hold for VPP > 1, but PP = 1 and VPP = "
            f"{layout.vpp}; set it to null, or parallelism.pipeline_model_parallel_size to 2 or more"
        )


def _check_pipeline(fields: _Fields, layout: Layout) -> None:
    _check_interleaving(fields, layout)
    if layout.pp > 1 and fields.get("pipeline_dtype") is None:
        raise ConfigError(
            f"precision.pipeline_dtype: is missing with PP = {layout.pp}; set the dtype of training (precision=...)"
        )


def _check_point_to_point(fields: _Fields, layout: Layout) -> None:
    overlap, batched = fields.get("overlap_p2p_comm", False), fields.get("batch_p2p_comm", True)
    found = f"overlap_p2p_comm={str(overlap).lower()} and batch_p2p_comm={str(batched).lower()}"
    key = fields.key("batch_p2p_comm" if overlap else "overlap_p2p_comm")
    both = "set parallelism.overlap_p2p_comm=true and parallelism.batch_p2p_comm=false"
    if layout.pp == 2 and layout.vpp > 1 and (batched or not overlap):
        # Both neighbours are then the same process and the two messages of an exchange are mistaken for each other.
        raise ConfigError(
            f"{key}: PP = 2 with VPP = {layout.vpp} computes wrong gradients, without an error, under {found}; {both}"
        )
    if layout.vpp > 1 and overlap and batched:
        raise ConfigError(f"{key}: VPP = {layout.vpp} cannot run under {found}; {both}")
    if layout.pp > 1 and layout.vpp == 1 and overlap:
        raise ConfigError(
            f"{fields.key('overlap_p2p_comm')}: VPP > 1 must hold, but VPP = 1; set it to false, or "
            "parallelism.virtual_pipeline_model_parallel_size to 2 or more"
        )


def _check_layers(fields: _Fields, layout: Layout) -> None:
    """Layers per stage and chunk: the first and last stage may differ, or embedding and loss count as a layer each."""
    if fields.get("pipeline_model_parallel_layout") is not None:
        return
    ends = [f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    ends = [name for name in ends if fields.get(name) is not None]
    counted = [name for name in ("embedding", "loss") if fields.get(f"account_for_{name}_in_pipeline_split", False)]
    vpp = fields.number("virtual_pipeline_model_parallel_size")
    layers, pp = fields.number("num_layers"), fields.number("pipeline_model_parallel_size")
    if not ends:
        name = " + ".join(["num_layers", *(f"1 for the {name}" for name in counted)])
        whole = layers._replace(name=name, value=layers.value + len(counted), movable=not counted)
        divisibility.require(whole, by=(pp, vpp))
        return
    if counted:
        clash = f"account_for_{counted[0]}_in_pipeline_split"
        raise ConfigError(f"{fields.key(ends[0])}: does not go with {clash}=true; set one of the two")
    for name in ends:
        divisibility.require(fields.number(name), by=[vpp])
    left, stages = layers.value - sum(fields.get(name) for name in ends), layout.pp - len(ends)
    if left < 0 or stages < 0 or (left == 0) != (stages == 0):
        raise ConfigError(
            f"{fields.key(ends[0])}: num_layers less {' and '.join(ends)} = {left} layers remain for {stages} middle "
            f"stages (num_layers = {layers.value}, PP = {layout.pp}); set it so that every middle stage has layers"
        )
    if stages:
        middle = Number(f"(num_layers - {' - '.join(ends)})", left, fields.key(ends[0]), movable=False)
        divisibility.require(middle, by=(Number("middle stages", stages), vpp))


def _check_experts(fields: _Fields, layout: Layout) -> None:
    experts = fields.get("num_moe_experts")
    ep, etp = fields.number("expert_model_parallel_size"), fields.number("expert_tensor_parallel_size", layout.tp)
    if experts is None:
        for number in (ep, etp):
            if number.key and number.value > 1:
                raise ConfigError(f"{number.key}: {number.value} needs a model with model.num_moe_experts; set it to 1")
        return
    etp_key = etp.key or "parallelism.expert_tensor_parallel_size"
    divisibility.require(fields.number("num_moe_experts"), by=[ep])
    dense = fields.number("ffn_hidden_size", 4 * fields.get("hidden_size"))
    own = fields.get("moe_ffn_hidden_size") is not None
    divisibility.require(fields.number("moe_ffn_hidden_size") if own else dense, by=[etp._replace(key=etp_key)])
    if layout.ep == 1 and layout.etp < layout.tp:
        # tensor_parallel/layers.py marks expert weights for the expert groups only if EP > 1.
        larger = nearest(divisors(experts)[1:], layout.tp)
        more = f", or parallelism.expert_model_parallel_size to {either(larger)}" if larger else ""
        raise ConfigError(
            f"{etp_key}: with EP = 1, ETP >= TP must hold or the ranks' experts drift apart, but "
            f"{layout.etp} < {layout.tp}; set {etp_key} to {layout.tp}{more}"
        )
    if layout.tp > 1 and not fields.get("sequence_parallel", False):
        raise ConfigError(
            f"parallelism.sequence_parallel: must be true for experts with TP > 1, but it is false with "
            f"TP = {layout.tp}; set it to true"
        )
    if layout.etp > 1 and fields.get("add_bias_linear", True):
        raise ConfigError(
            f"{etp_key}: ETP = 1 must hold for experts with biases, but ETP = {layout.etp}; "
            f"set {etp_key} to 1, or model.add_bias_linear to false"
        )
    if layout.ep > 1 and fields.get("use_cpu_initialization", False):
        raise ConfigError(
            f"{fields.key('use_cpu_initialization')}: gives all {layout.ep} EP ranks the same experts; set it to false"
        )


def _check_optimizer(fields: _Fields, layout: Layout) -> None:
    instances = fields.number("num_distributed_optimizer_instances")
    gathers = fields.get("overlap_param_gather", False)
    needs = [("overlap_param_gather", "use_distributed_optimizer")] if gathers else []
    needs += [("overlap_param_gather", "overlap_grad_reduce")] if gathers else []
    needs += [(instances.name, "use_distributed_optimizer")] if instances.value > 1 else []
    for name, needed in needs:
        if not fields.get(needed, False):
            raise ConfigError(
                f"{fields.key(name)}: {fields.get(name)} needs {needed}, which is false; "
                f"set parallelism.{needed} to true"
            )
    divisibility.require(Number("DP x CP", layout.dp * layout.cp, movable=False), by=[instances])


def _check_batch(layout: Layout, batch: Batch) -> None:
    micro = Number("micro_batch_size", batch.micro_batch_size, "train.micro_batch_size")
    per_step = (micro, Number("DP", layout.dp, movable=False))
    note = _dp_formula(layout)
    whole = Number("global_batch_size", batch.global_batch_size, "train.global_batch_size")
    divisibility.require(whole, by=per_step, note=note)
    if batch.rampup is None:
        return
    key = "train.rampup_batch_size"
    if len(batch.rampup) != 3 or min(batch.rampup[:2]) < 1 or batch.rampup[2] < 0:
        raise ConfigError(
            f"{key}: {list(batch.rampup)} is not [start, increment, samples]; set three whole numbers, start and "
            "increment from 1 up"
        )
    start, increment, _ = batch.rampup
    if start > whole.value:
        raise ConfigError(
            f"{key}: start <= global_batch_size must hold, but {start} > {whole.value}; "
            f"set start to {whole.value} or less"
        )
    divisibility.require(Number("start", start, key), by=per_step, note=note)
    divisibility.require(Number("increment", increment, key), by=per_step, note=note)
    growth = Number("(global_batch_size - start)", whole.value - start, key, movable=False)
    divisibility.require(growth, by=[Number("increment", increment, key)])


def _check_microbatches(fields: _Fields, layout: Layout, batch: Batch) -> None:
    """An interleaved schedule sends microbatches through the chunks in groups: PP <= group <= microbatches."""
    if layout.vpp == 1:
        return
    group = fields.number("microbatch_group_size_per_vp_stage", layout.pp)
    if group.value < layout.pp:
        raise ConfigError(f"{group.key}: group >= PP must hold, but {group.value} < {layout.pp}; set it to {layout.pp}")
    smallest = min(batch.global_batch_size, batch.rampup[0]) if batch.rampup else batch.global_batch_size
    per_step = batch.micro_batch_size * layout.dp
    microbatches = smallest // per_step
    rest = microbatches % group.value
    if microbatches >= group.value and (rest == 0 or rest >= layout.pp):
        return
    key = "train.rampup_batch_size" if smallest < batch.global_batch_size else "train.global_batch_size"
    legal = divisibility.nearest_multiples(smallest, group.value * per_step)
    raise ConfigError(
        f"{key}: with VPP = {layout.vpp}, batch / (micro_batch_size x DP) must be a multiple of the {group.value} "
        f"microbatches of a group, but {smallest} / ({batch.micro_batch_size} x {layout.dp}) = {microbatches}"
        f"{_dp_formula(layout)}; set the batch to {either(legal)}"
    )


def _dp_formula(layout: Layout) -> str:
    sizes = f"{layout.world_size} / ({layout.tp} x {layout.pp} x {layout.cp})"
    return f" (DP = processes / (TP x PP x CP) = {sizes} = {layout.dp})"
