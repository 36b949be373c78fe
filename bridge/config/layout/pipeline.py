"""Rules about layers divided over processes."""

import re
from typing import Any

from bridge.config import divisibility
from bridge.config.divisibility import Number, either
from bridge.config.layout.sizes import Batch, Fields, Layout, dp_formula
from bridge.errors import ConfigError


def chunks(fields: Fields, pp: Number) -> int:
    """Chunks of layers per process: as set, or as many as pipeline_model_parallel_layout spells out."""
    spelled = fields.get("pipeline_model_parallel_layout")
    asked = fields.number("virtual_pipeline_model_parallel_size")
    if spelled is None:
        return asked.value
    stages = count_stages(spelled)
    divisibility.require(Number("stages of pipeline_model_parallel_layout", stages, movable=False), by=[pp])
    if asked.key and fields.get(asked.name) not in (None, stages // pp.value):
        raise ConfigError(
            f"{asked.key}: stages of pipeline_model_parallel_layout / PP = VPP must hold, but {stages} / {pp.value} = "
            f"{stages // pp.value}, not {asked.value}; set it to {stages // pp.value}"
        )
    return stages // pp.value


def count_stages(spelled: str | list[Any]) -> int:
    """Stages in a layout such as `Et*3|(tt|)*2,L`: megatron-core unrolls (..)*n, then x*n, and splits at `|`."""
    if isinstance(spelled, list):
        return len(spelled)
    unrolled = spelled.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        unrolled = re.sub(repeated, lambda found: found.group(1) * int(found.group(2)), unrolled)
    return len(unrolled.split("|"))


def interleaving(fields: Fields, layout: Layout) -> None:
    if layout.vpp > 1 and layout.pp == 1:
        raise ConfigError(
            f"{fields.key('virtual_pipeline_model_parallel_size')}: PP > 1 must hold for VPP > 1, but PP = 1 and VPP = "
            f"{layout.vpp}; set it to null, or parallelism.pipeline_model_parallel_size to 2 or more"
        )


def dtype_of_messages(fields: Fields, layout: Layout, batch: Batch) -> None:
    if layout.pp > 1 and fields.get("pipeline_dtype") is None:
        raise ConfigError(
            f"precision.pipeline_dtype: is missing with PP = {layout.pp}; set the dtype of training (precision=...)"
        )


def point_to_point(fields: Fields, layout: Layout) -> None:
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


def layers_per_stage(fields: Fields, layout: Layout) -> None:
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


def microbatches(fields: Fields, layout: Layout, batch: Batch) -> None:
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
        f"{dp_formula(layout)}; set the batch to {either(legal)}"
    )
