"""Rules about layers divided over processes."""

import re
from typing import Any

from bridge.config import divisibility
from bridge.config.divisibility import Number, either
from bridge.config.layout.sizes import Batch, Layout, dp_formula
from bridge.config.routing import Routed
from bridge.errors import ConfigError, shown


def chunks(routed: Routed) -> int:
    """Chunks of layers per process: as set, or as many as pipeline_model_parallel_layout spells out."""
    pp, spelled = routed.number("pipeline_model_parallel_size"), routed.get("pipeline_model_parallel_layout")
    asked = routed.number("virtual_pipeline_model_parallel_size")
    if spelled is None:
        return asked.value
    stages = count_stages(spelled)
    divisibility.require(Number("stages of pipeline_model_parallel_layout", stages, movable=False), by=[pp])
    if asked.key and routed.get(asked.name) not in (None, stages // pp.value):
        raise ConfigError(
            f"{asked.key}: stages of pipeline_model_parallel_layout / PP = VPP must hold, but {stages} / {pp.value} = "
            f"{stages // pp.value}, not {asked.value}; set it to {stages // pp.value}"
        )
    return stages // pp.value


def count_stages(spelled: str | list[Any]) -> int:
    """Stages in a layout such as `Et*3|(tt|)*2,L`: megatron-core unrolls (..)*n, then x*n, and splits at `|`."""
    if isinstance(spelled, list):
        return len(spelled)
    return len(_unrolled(spelled).split("|"))


def _unrolled(spelled: str) -> str:
    unrolled = spelled.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        unrolled = re.sub(repeated, lambda found: found.group(1) * int(found.group(2)), unrolled)
    return unrolled


def interleaving(routed: Routed, layout: Layout) -> None:
    if layout.vpp > 1 and layout.pp == 1:
        raise ConfigError(
            f"{routed.key('virtual_pipeline_model_parallel_size')}: PP > 1 must hold for VPP > 1, but PP = 1 and VPP = "
            f"{layout.vpp}; set it to null, or parallelism.pipeline_model_parallel_size to 2 or more"
        )


def dtype_of_messages(routed: Routed, layout: Layout, batch: Batch) -> None:
    if layout.pp > 1 and routed.get("pipeline_dtype") is None:
        raise ConfigError(
            f"precision.pipeline_dtype: is missing with PP = {layout.pp}; set the dtype of training (precision=...)"
        )


def point_to_point(routed: Routed, layout: Layout) -> None:
    overlap, batched = routed.get("overlap_p2p_comm"), routed.get("batch_p2p_comm")
    found = f"overlap_p2p_comm={str(overlap).lower()} and batch_p2p_comm={str(batched).lower()}"
    key = routed.key("batch_p2p_comm" if overlap else "overlap_p2p_comm")
    both = "set parallelism.overlap_p2p_comm=true and parallelism.batch_p2p_comm=false"
    if layout.pp == 2 and layout.vpp > 1 and (batched or not overlap):
        # Both neighbours are then the same process and the two messages of an exchange are mistaken for each other.
        raise ConfigError(
            f"{key}: PP = 2 with VPP = {layout.vpp} computes wrong gradients, without an error, with {found}; {both}"
        )
    if layout.vpp > 1 and overlap and batched:
        raise ConfigError(f"{key}: VPP = {layout.vpp} cannot run with {found}; {both}")
    if layout.pp > 1 and layout.vpp == 1 and overlap:
        raise ConfigError(
            f"{routed.key('overlap_p2p_comm')}: VPP > 1 must hold, but VPP = 1; set it to false, or "
            "parallelism.virtual_pipeline_model_parallel_size to 2 or more"
        )


def layers_per_stage(routed: Routed, layout: Layout) -> None:
    """Layers per stage and chunk: the first and last stage may differ, or embedding and loss count as a layer each."""
    if routed.get("pipeline_model_parallel_layout") is not None:
        _spelled_layers(routed, routed.get("pipeline_model_parallel_layout"))
        return
    ends = [f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    ends = [name for name in ends if routed.get(name) is not None]
    counted = [name for name in ("embedding", "loss") if routed.get(f"account_for_{name}_in_pipeline_split")]
    vpp = routed.number("virtual_pipeline_model_parallel_size")
    layers, pp = routed.number("num_layers"), routed.number("pipeline_model_parallel_size")
    if not ends:
        name = " + ".join(["num_layers", *(f"1 for the {name}" for name in counted)])
        whole = layers._replace(name=name, value=layers.value + len(counted), movable=not counted)
        divisibility.require(whole, by=(pp, vpp))
        return
    if counted:
        clash = f"account_for_{counted[0]}_in_pipeline_split"
        raise ConfigError(f"{routed.key(ends[0])}: cannot be combined with {clash}=true; set one of the two")
    for name in ends:
        divisibility.require(routed.number(name), by=[vpp])
    left, stages = layers.value - sum(routed.get(name) for name in ends), layout.pp - len(ends)
    if left < 0 or stages < 0 or (left == 0) != (stages == 0):
        raise ConfigError(
            f"{routed.key(ends[0])}: num_layers minus {' and '.join(ends)} = {left} layers remain for {stages} "
            f"middle stages (num_layers = {layers.value}, PP = {layout.pp}); set it so that every middle stage has "
            "layers"
        )
    if stages:
        middle = Number(f"(num_layers - {' - '.join(ends)})", left, routed.key(ends[0]), movable=False)
        divisibility.require(middle, by=(Number("middle stages", stages), vpp))


OTHER_SPLITS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
# What a layout consists of, in its order: letter, word, field that says how many there are (None: one).
PARTS = (
    ("E", "embedding", None),
    ("t", "decoder", "num_layers"),
    ("m", "mtp", "mtp_num_layers"),
    ("L", "loss", None),
)


def _spelled_layers(routed: Routed, spelled: str | list[Any]) -> None:
    """pipeline_model_parallel_layout has every part of the model, in order, and is the only split."""
    key = routed.key("pipeline_model_parallel_layout")
    for name in OTHER_SPLITS:
        if routed.get(name):
            raise ConfigError(
                f"{routed.key(name)}: cannot be combined with pipeline_model_parallel_layout; set one of the two"
            )
    letter_of = {word: letter for letter, word, _ in PARTS}
    stages = _unrolled(spelled).split("|") if isinstance(spelled, str) else spelled
    parts = [letter_of.get(part, part) for stage in stages for part in stage]
    if unknown := set(parts) - {letter for letter, *_ in PARTS}:
        known = ", ".join(f"{letter} ({word})" for letter, word, _ in PARTS)
        raise ConfigError(f"{key}: unknown symbol {shown(min(unknown))}; a layout is made of {known}")
    for letter, word, field in PARTS:
        wanted = 1 if field is None else routed.get(field, 0)
        if parts.count(letter) != wanted:
            raise ConfigError(
                f"{key}: {letter} ({word}) must appear {wanted} times ({field or 'one for every model'}), but "
                f"{spelled} has {parts.count(letter)}; set a layout with {wanted}"
            )
    order = [letter for letter, *_ in PARTS]
    if sorted(parts, key=order.index) != parts:
        raise ConfigError(f"{key}: the order must be {' '.join(order)}, but is {''.join(parts)}; set it in that order")


def microbatches(routed: Routed, layout: Layout, batch: Batch) -> None:
    """An interleaved schedule sends microbatches through the chunks in groups: PP <= group <= microbatches."""
    if layout.vpp == 1:
        return
    group = routed.number("microbatch_group_size_per_vp_stage", layout.pp)
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
