"""The dry run's text."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from bridge import platform
from bridge.config import layout
from bridge.config.layout import Layout
from bridge.config.run_config import RunConfig
from bridge.estimate import pieces
from bridge.estimate.stages import OVERHEAD, Memory, memory
from bridge.models import gpt
from bridge.training import flops

OVERHEAD_NOTE = f"the CUDA context and NCCL take about {OVERHEAD / 2**30:g} GiB more"


class Parameters(NamedTuple):
    """Of the whole model with its true vocabulary. `active`: those a token meets; fewer than `total` with experts."""

    total: int
    active: int


def parameters(config: RunConfig) -> Parameters:
    """Exact counts, of a whole model without vocabulary padding."""
    routed = dataclasses.replace(config, parallelism={}).routed
    routed = dataclasses.replace(routed, gpt=routed.gpt | {"make_vocab_size_divisible_by": 1})
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


def report(config: RunConfig, *, world_size: int) -> str:
    """The dry run's text. Raises ConfigError when the layout does not fit `world_size` or the model cannot be built."""
    shape = layout.derive(config.routed, world_size=world_size)
    counted = parameters(config)
    length, train = config.data["sequence_length"], config.train
    micro_batch_size = train.sequences_per_pass(shape.dp)
    micro_batches = train.global_batch_size // (micro_batch_size * shape.dp)
    epochs = f"{train.epochs} x all training samples; how many steps that is follows from the prepared data"
    active = "" if counted.active == counted.total else f", {_count(counted.active)} active per token"
    lines = [
        f"layout        {_layout(shape)}",
        f"batch         {micro_batches} x {micro_batch_size} sequences of {length} tokens per process and step",
        *([f"epochs        {epochs}"] if train.epochs is not None else []),
        f"parameters    {_count(counted.total)}{active}",
        f"FLOPs         {_flops(config) / 1e9:,.3g} GFLOP per token, forward and backward",
        *_memory_lines(config, world_size=world_size),
    ]
    return "\n".join(lines)


def _memory_lines(config: RunConfig, *, world_size: int) -> list[str]:
    """A table of the stages. A machine without a GPU plans for one with Transformer Engine, and adds its own total."""
    here = platform.has_transformer_engine()
    planned = here or platform.num_devices() == 0
    stages = memory(config, world_size=world_size, fused=planned)
    fullest = max(stages, key=lambda stage: stage.total)
    engine = "with" if planned else "without"
    per_stage = world_size // len(stages)
    ranks = f"rank {per_stage * fullest.stage}" + (
        f" to {per_stage * (fullest.stage + 1) - 1}" if per_stage > 1 else ""
    )
    lines = [f"memory        GiB at the peak of a process, {engine} Transformer Engine", *_table(stages)]
    lines.append(f"fullest       {ranks} (stage {fullest.stage}): {gib(fullest.total)} GiB; {OVERHEAD_NOTE}")
    if planned and not here:
        most = max(stage.total for stage in memory(config, world_size=world_size, fused=False))
        lines.append(f"              without Transformer Engine, as on this machine: {gib(most)} GiB")
    return lines


def _table(stages: Sequence[Memory]) -> list[str]:
    header = ("stage", "weights", "gradients", "optimizer", "activations", "total")
    rows = ((str(stage.stage), *(gib(size) for size in (*stage[1:], stage.total))) for stage in stages)
    return table([header, *rows])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of right-aligned columns, as wide as they have to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _flops(config: RunConfig) -> float:
    routed = pieces.small(config.routed)
    model = gpt.transformer_config(routed, meta=True)
    return flops.per_token(model, vocab_size=routed.gpt["vocab_size"], sequence_length=config.data["sequence_length"])


def _layout(shape: Layout) -> str:
    factors = {"TP": shape.tp, "PP": shape.pp, "CP": shape.cp, "DP": shape.dp}
    product = " x ".join(f"{name} {size}" for name, size in factors.items())
    within = {"VPP": shape.vpp, "EP": shape.ep, "ETP": shape.etp if shape.ep > 1 else 1}
    return f"{shape.world_size} = {product}" + "".join(f", {name} {size}" for name, size in within.items() if size > 1)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.3f} {unit}"
    return str(number)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f}"
