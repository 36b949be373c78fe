"""What a run would need, without running it: parameters, FLOPs per token, and the memory of the fullest process.

Weights are counted on meta-device models of every pipeline stage, built as that rank of the real world would build
them; gradients and optimizer state follow from the counts. Activations are an estimate from the architecture.
"""

import dataclasses
from typing import NamedTuple

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge import parallel, platform
from bridge.config import layout
from bridge.config.layout import Layout
from bridge.config.routing import Routed
from bridge.config.run_config import RunConfig
from bridge.models import gpt
from bridge.models.gpt import GPT
from bridge.training import flops

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class Parameters(NamedTuple):
    """Of the whole model with its true vocabulary. `active`: those a token meets; fewer than `total` with experts."""

    total: int
    active: int


class Memory(NamedTuple):
    """Bytes on one process of pipeline stage `stage`; `activations` at their peak, all else for the whole run."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    activations_fused: int  # the same with Transformer Engine's fused norms and activation functions

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def report(config: RunConfig, *, world_size: int) -> str:
    """The dry run's text. Raises ConfigError when the layout does not fit `world_size` or the model cannot be built."""
    shape = layout.derive(config.routed(), world_size=world_size)
    counted = parameters(config)
    fullest = max(memory(config, world_size=world_size), key=lambda stage: stage.total)
    length, train = config.data["sequence_length"], config.train
    micro_batch_size = train.sequences_per_pass(shape.dp)
    micro_batches = train.global_batch_size // (micro_batch_size * shape.dp)
    active = "" if counted.active == counted.total else f", {_count(counted.active)} active per token"
    lines = [
        f"layout        {_layout(shape)}",
        f"batch         {micro_batches} x {micro_batch_size} sequences of {length} tokens per process and step",
        f"parameters    {_count(counted.total)}{active}",
        f"FLOPs         {_flops(config) / 1e9:,.3g} GFLOP per token, forward and backward",
        f"memory        {_gib(fullest.total)} on the fullest process (pipeline stage {fullest.stage})",
        f"  weights     {_gib(fullest.weights)}",
        f"  gradients   {_gib(fullest.gradients)}",
        f"  optimizer   {_gib(fullest.optimizer)}",
        f"  activations {_gib(fullest.activations)} (estimated{_with_fused_kernels(fullest)})",
    ]
    return "\n".join(lines)


def parameters(config: RunConfig) -> Parameters:
    """Exact counts, of a whole model without vocabulary padding."""
    routed = _buildable(dataclasses.replace(config, parallelism={}).routed())
    routed = routed._replace(gpt=routed.gpt | {"make_vocab_size_divisible_by": 1})
    with parallel.fake(1, 0, {}):
        (model,) = gpt.build(routed, meta=True)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, in_experts = sum(sizes.values()), sum(size for name, size in sizes.items() if _is_expert(name))
    if not in_experts:
        return Parameters(total, total)
    visited = in_experts * model.config.moe_router_topk // model.config.num_moe_experts
    return Parameters(total, total - in_experts + visited)


def memory(config: RunConfig, *, world_size: int) -> list[Memory]:
    """Bytes per process, one entry per pipeline stage; processes of one stage need the same, to a rounding."""
    routed = _buildable(config.routed())
    shape = layout.derive(routed, world_size=world_size)
    stages = []
    for stage in range(shape.pp):
        # Pipeline stages are megatron-core's outermost order: stage k holds a contiguous block of ranks.
        with parallel.fake(world_size, stage * world_size // shape.pp, routed.transformer):
            chunks = gpt.build(routed, meta=True)
        stages.append(_stage_memory(config, routed, shape, chunks, stage=stage))
    return stages


def _buildable(routed: Routed) -> Routed:
    """Without values that only the machine of the real run can honour; none of them changes a shape."""
    return routed._replace(transformer=platform.honoured(routed.transformer))


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _stage_memory(config: RunConfig, routed: Routed, shape: Layout, chunks: list[GPT], *, stage: int) -> Memory:
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    experts = sum(parameter.numel() for name, parameter in named if _is_expert(name))
    dense = sum(parameter.numel() for _, parameter in named) - experts
    weight_bytes = named[0][1].element_size()
    gradient_bytes = 4 if routed.ddp.get("grad_reduce_in_fp32") else weight_bytes
    replicas, expert_replicas = 1, 1
    if routed.ddp.get("use_distributed_optimizer"):
        instances = routed.ddp.get("num_distributed_optimizer_instances", 1)
        replicas = shape.dp * shape.cp // instances
        expert_replicas = shape.world_size // (shape.pp * shape.ep * shape.etp) // instances
    states = _optimizer_bytes(routed, weight_bytes=weight_bytes)
    fused, unfused = (_activations(config, shape, chunks, stage=stage, fused=fused) for fused in (True, False))
    return Memory(
        stage=stage,
        weights=(dense + experts) * weight_bytes,
        gradients=(dense + experts) * gradient_bytes,
        optimizer=states * dense // replicas + states * experts // expert_replicas,
        activations=fused if platform.has_transformer_engine() else unfused,
        activations_fused=fused,
    )


def _optimizer_bytes(routed: Routed, *, weight_bytes: int) -> int:
    """Bytes per parameter: a 32-bit copy of 16-bit weights, and Adam's two moments or SGD's one.

    megatron-core's precision-aware optimizer keeps each in a dtype of its own (OptimizerConfig's *_dtype).
    """
    fields = routed.optimizer
    if fields.get("optimizer", "adam") == "sgd":
        moments = ["momentum"] if fields.get("sgd_momentum", 0.9) else []
    else:
        moments = ["exp_avg_dtype", "exp_avg_sq_dtype"]
    copies = ["main_params_dtype"] if weight_bytes < 4 else []
    return sum(BYTES[fields.get(name, "fp32")] for name in moments + copies)


def _activations(config: RunConfig, shape: Layout, chunks: list[GPT], *, stage: int, fused: bool) -> int:
    """Peak bytes that forward passes keep for their backward passes on one process.

    Per layer and token as in Korthikanti et al. 2022 (arXiv 2205.05198), section 4, without the attention matrix, which
    no kernel used here stores. Times the micro-batches in flight on this stage (1F1B, or interleaved).
    """
    model = chunks[0].config
    micro_batch_size = config.train.sequences_per_pass(shape.dp)
    tokens = micro_batch_size * config.data["sequence_length"] // shape.cp
    micro_batches = config.train.global_batch_size // (micro_batch_size * shape.dp)
    in_flight = _chunks_in_flight(model, shape, micro_batches, stage=stage)
    layers = [len(chunk.decoder.layers) + (len(chunk.mtp.layers) if chunk.mtp_process else 0) for chunk in chunks]
    per_layer = _layer_elements(model, fused=fused)
    if model.recompute_granularity == "full":
        kept_inputs = model.hidden_size / (shape.tp if model.sequence_parallel else 1)
        elements = kept_inputs * max(layers) * in_flight + per_layer  # and one layer as it is recomputed
    else:
        elements = per_layer * max(layers) * in_flight
    bytes_per_element = next(chunks[0].parameters()).element_size()
    total = tokens * elements * bytes_per_element
    if chunks[-1].post_process:
        heads = 1 + (model.mtp_num_layers or 0)  # each prediction module's loss needs logits of its own
        total += heads * tokens * _head_bytes(model, vocab=chunks[-1].vocab_size // shape.tp, width=bytes_per_element)
    return int(total)


def _chunks_in_flight(model: TransformerConfig, shape: Layout, micro_batches: int, *, stage: int) -> int:
    """Forward passes of one chunk of layers that wait for their backward pass (megatron-core's schedules.py:759)."""
    if shape.vpp == 1:
        return min(micro_batches, shape.pp - stage)
    group = model.microbatch_group_size_per_vp_stage or shape.pp
    warm_up = 2 * (shape.pp - stage - 1) + (shape.vpp - 1) * group
    return min(micro_batches * shape.vpp, warm_up + 1)


def _layer_elements(model: TransformerConfig, *, fused: bool) -> float:
    """Numbers kept per token by one layer on one tensor-parallel process.

    Two norms keep their input and output (torch's unfused RMSNorm the normalised input as well); attention its fused
    QKV output, the rotated queries and keys and its result; a gated MLP both halves of its first product and their
    product (unfused, the activation and a copy of one half as well). Recomputing parts of a layer only lowers this.
    """
    tp = model.tensor_model_parallel_size
    norms = 2 * (2 if fused else 3) * model.hidden_size / (tp if model.sequence_parallel else 1)
    factor = (3 if fused else 5) if model.gated_linear_unit else 2
    return norms + _attention_elements(model, fused=fused) + factor * _mlp_width(model) / tp


def _attention_elements(model: TransformerConfig, *, fused: bool) -> float:
    """Of these, attention's: see `_layer_elements`. The latents of multi-latent attention are on every process."""
    tp, heads, groups = model.tensor_model_parallel_size, model.num_attention_heads, model.num_query_groups
    if not isinstance(model, MLATransformerConfig):
        assert groups is not None and model.kv_channels is not None
        attention = (heads + 2 * groups + heads + groups + heads) * model.kv_channels
        if model.qk_layernorm and not fused:
            attention += (heads + groups) * model.kv_channels
        return attention / tp
    # The norm's input (a part of the down-projection's output) and output, and between them what an unfused norm keeps.
    latents = (model.kv_lora_rank + (model.q_lora_rank or 0)) * (2 if fused else 3) + model.qk_pos_emb_head_dim
    latents /= tp if model.sequence_parallel else 1
    # Queries and keys joined of their two parts, values, the result. Values narrower than keys make torch on a CPU, but
    # not on a GPU, keep the attention matrix as well, which is not counted.
    return latents + heads * (2 * (model.qk_head_dim + model.qk_pos_emb_head_dim) + 2 * model.v_head_dim) / tp


def _mlp_width(model: TransformerConfig) -> int:
    """Intermediate channels a token passes through: of its experts and the shared one, or of the dense MLP."""
    if model.num_moe_experts is None:
        return model.ffn_hidden_size
    shared = model.moe_shared_expert_intermediate_size or 0
    return model.moe_router_topk * (model.moe_ffn_hidden_size or model.ffn_hidden_size) + shared


def _head_bytes(model: TransformerConfig, *, vocab: int, width: int) -> float:
    """Bytes per token of the final norm, the logits and their float32 softmax, whose memory the gradient reuses."""
    norm = 3 * model.hidden_size * width / (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    fused_loss = model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl == "te"
    return norm + vocab * (width if fused_loss or width == 4 else width + 4)


def _flops(config: RunConfig) -> float:
    routed = _buildable(config.routed())
    model = gpt.transformer_config(routed, meta=True)
    return flops.per_token(model, vocab_size=routed.gpt["vocab_size"], sequence_length=config.data["sequence_length"])


def _layout(shape: Layout) -> str:
    factors = {"TP": shape.tp, "PP": shape.pp, "CP": shape.cp, "DP": shape.dp}
    product = " x ".join(f"{name} {size}" for name, size in factors.items())
    within = {"VPP": shape.vpp, "EP": shape.ep, "ETP": shape.etp if shape.ep > 1 else 1}
    return f"{shape.world_size} = {product}" + "".join(f", {name} {size}" for name, size in within.items() if size > 1)


def _with_fused_kernels(stage: Memory) -> str:
    if stage.activations_fused == stage.activations:
        return ""
    return f"; {_gib(stage.activations_fused).strip()} with Transformer Engine"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.3f} {unit}"
    return str(number)


def _gib(size: int) -> str:
    return f"{size / 2**30:8.3f} GiB"
