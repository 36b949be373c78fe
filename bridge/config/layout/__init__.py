"""The rules a parallel layout must meet, on plain numbers: no torch, no megatron-core.

Each is a rule that megatron-core 0.16.1 asserts somewhere in a worker, or computes wrong results without. Every message
gives the formula with its numbers and the nearest legal values. The files beside this one hold the rules by what they
are about; here is which of them a program must meet.
"""

from collections.abc import Callable

from bridge.config import divisibility
from bridge.config.divisibility import Number
from bridge.config.layout import batch, experts, overlap, pipeline, recompute, tensor
from bridge.config.layout.sizes import Batch, Layout
from bridge.config.routing import Routed
from bridge.config.schema import Train
from bridge.errors import ConfigError, shown

__all__ = ["Batch", "Layout", "check", "check_model", "derive"]

# Of a model and its layout. The first rule that is broken is the one reported, so the plainer ones come first.
MODEL_RULES: tuple[Callable[[Routed, Layout], None], ...] = (
    tensor.heads,
    tensor.tensor_parallel,
    pipeline.interleaving,
    pipeline.point_to_point,
    pipeline.layers_per_stage,
    experts.experts,
    recompute.recompute,
    overlap.needs,
    overlap.experts_while_computing,
    overlap.tensor_parallel_buffers,
)
# Of a run of train.py besides.
TRAINING_RULES: tuple[Callable[[Routed, Layout, Batch], None], ...] = (
    tensor.sequence_length,
    tensor.sequence_parts,
    pipeline.dtype_of_messages,
    batch.optimizer,
    batch.global_batch,
    pipeline.microbatches,
)


def check(routed: Routed, *, world_size: int, sequence_length: int, train: Train) -> Layout:
    """The layout of `routed` on `world_size` processes. Raises ConfigError on the first rule that is broken.

    sequence_length in tokens.
    """
    layout = _check_model(routed, world_size=world_size)
    micro_batch_size = train.sequences_per_pass(layout.dp)
    sizes = Batch(sequence_length, train.global_batch_size, micro_batch_size, train.rampup_batch_size)
    for rule in TRAINING_RULES:
        rule(routed, layout, sizes)
    return layout


def check_model(routed: Routed, *, world_size: int) -> Layout:
    """The rules of `check` that need no batch, for programs with a training loop of their own."""
    layout = _check_model(routed, world_size=world_size)
    tensor.prediction_in_parts(routed, layout)
    return layout


def _check_model(routed: Routed, *, world_size: int) -> Layout:
    _check_positive(routed)
    layout = derive(routed, world_size=world_size)
    for rule in MODEL_RULES:
        rule(routed, layout)
    return layout


def derive(routed: Routed, *, world_size: int) -> Layout:
    """The sizes alone, with DP as what is left. Raises ConfigError when `world_size` cannot be divided as asked."""
    processes = Number("processes", world_size, "train.num_devices")
    tp = routed.number("tensor_model_parallel_size")
    pp = routed.number("pipeline_model_parallel_size")
    cp = routed.number("context_parallel_size")
    ep = routed.number("expert_model_parallel_size")
    etp = routed.number("expert_tensor_parallel_size", tp.value)
    divisibility.require(processes, by=(tp, pp, cp))
    if routed.get("num_moe_experts") is not None:
        divisibility.require(processes, by=(etp, ep, pp))
    dp = world_size // (tp.value * pp.value * cp.value)
    return Layout(tp.value, pp.value, cp.value, ep.value, etp.value, dp, pipeline.chunks(routed), world_size)


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
    "recompute_num_layers",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
)


def _check_positive(routed: Routed) -> None:
    for name in _POSITIVE:
        value = routed.given.get(name)
        if value is not None and value < 1:
            raise ConfigError(f"{routed.key(name)}: {shown(value)} is not positive; set a whole number from 1 up")
