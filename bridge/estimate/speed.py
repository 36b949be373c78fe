"""How long a step would take: a model of costs that orders layouts, no more.

Matrix products, attention, memory traffic and messages of one micro-batch add up; what megatron-core overlaps counts as
far as it outlasts what it runs beside. Experts are evenly loaded and no process waits for data.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge.config import complete
from bridge.config.complete import Kind
from bridge.config.routing import Routed
from bridge.estimate.activations import Layer, Use
from bridge.estimate.pieces import Chunk, Pieces, Sizes
from bridge.models import gpt

# One Hopper GPU (H100, H200) with Transformer Engine, and its neighbours.
MATMUL = 790e12  # FLOP/s of a large bf16 product, measured on an H200
MATMUL_32 = 67e12  # FLOP/s in fp32; NVIDIA's data sheet
ATTENTION = 500e12  # FLOP/s of cuDNN's fused attention: 410 with 64 channels, 580 with 128 (FlashAttention-3's paper)
MEMORY = 3.0e12  # bytes/s: nine tenths of an H100's 3.35 TB/s
NVLINK = 350e9  # bytes/s of a GPU in a collective within a node (450 by the data sheet)
NETWORK = 45e9  # bytes/s of a GPU to other nodes: a 400 Gb/s adapter each
GPUS_PER_NODE = 8  # joined by NVLink
# Seconds that a CPU takes to issue the kernels of a layer, forward and backward; a GPU that is done sooner waits. 6, 15
# and 5 ms fit what benchmarks/parallelism.py measures on slow virtual CPUs. A DGX H100's 9058 tokens/s of Qwen3-30B
# (Megatron Bridge's performance summary) are 9.4 ms per layer with experts; the others are taken in proportion.
LAUNCH, LAUNCH_EXPERTS = 3.8e-3, 9.4e-3
LAUNCH_CONTEXT = 3.1e-3  # more, as attention goes step by step around the ring
MESSAGE = 50e-6  # seconds that a message between two GPUs takes at least
HALF_RATE = 256  # rows or columns with which a matrix product runs at half its rate
SLOWER_BACKWARD = 2.5  # attention's backward pass against its forward pass, which it computes again
TRAFFIC = 5  # times what a layer keeps: written and read by forward, read and its gradient written and read by backward
ACCUMULATION = 12  # bytes per weight and micro-batch to add a 16-bit gradient to a 32-bit one
UPDATE = 30  # bytes per weight that an optimizer step reads and writes
HIDDEN = 0.7  # share of a pass beside which messages of data parallelism are free


class Costs(NamedTuple):
    """Seconds of a step: `compute` on the slowest pipeline stage, and what comes on top."""

    compute: float
    recompute: float
    bubble: float
    tensor: float  # messages of tensor parallelism
    context: float
    experts: float
    pipeline: float
    data: float  # gradients, weights
    update: float

    @property
    def total(self) -> float:
        return sum(self)


class Cluster(NamedTuple):
    """`per_node` of `world` GPUs share a node."""

    world: int
    per_node: int

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes/s of each GPU in a collective of `ranks` that are `stride` apart.

        Between nodes every member in a node brings its own adapter, as NCCL's rings use them.
        """
        inside = max(1, min(ranks, self.per_node // stride))
        return NVLINK if ranks <= inside else min(NVLINK, inside * NETWORK)


class Pass(NamedTuple):
    """Seconds of one micro-batch, forward and backward."""

    compute: float
    recompute: float
    tensor: float
    context: float
    experts: float

    def plus(self, other: "Pass", times: int = 1) -> "Pass":
        return Pass(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


NOTHING = Pass(0.0, 0.0, 0.0, 0.0, 0.0)


def costs(
    model: Pieces,
    routed: Routed,
    how: Use,
    stages: Sequence[Sequence[Chunk]],
    kept: Mapping[Kind, Layer],
    *,
    micro_batches: int,
    cluster: Cluster,
) -> Costs:
    """Of one optimizer step of `micro_batches` on every data-parallel rank; `kept`: the activations of the layers."""
    shape = how.shape
    layers = {kind: _layer(model, kind, how, kept[kind], cluster) for kind in model.layers}
    slowest = max((_stage(model, routed, how, chunks, layers) for chunks in stages), key=sum)
    sends = 0.0
    if shape.pp > 1:
        link = NVLINK if cluster.world // shape.pp < cluster.per_node else NETWORK
        stream = how.tokens * model.config.hidden_size * how.width / shape.tp
        hidden = 1.0 if shape.vpp == 1 else 1 - HIDDEN  # only the interleaved schedule sends beside its work
        sends = 2 * shape.vpp * (hidden * stream / link + MESSAGE)
    once = sum(slowest) + sends
    data = max(_data_parallel(model, routed, how, chunks, cluster, once) for chunks in stages)
    return Costs(
        compute=micro_batches * slowest.compute,
        recompute=micro_batches * slowest.recompute,
        bubble=(shape.pp - 1) / shape.vpp * once,
        tensor=micro_batches * slowest.tensor,
        context=micro_batches * slowest.context,
        experts=micro_batches * slowest.experts,
        pipeline=micro_batches * sends,
        data=data,
        update=max(_update(model, routed, how, chunks) for chunks in stages),
    )


def _stage(model: Pieces, routed: Routed, how: Use, chunks: Sequence[Chunk], layers: Mapping[Kind, Pass]) -> Pass:
    total = NOTHING
    kinds = Counter(model.kinds[index] for chunk in chunks for index in chunk.layers)
    for kind, times in kinds.items():
        total = total.plus(layers[kind], times)
    if not chunks[-1].head:
        return total
    modules = model.config.mtp_num_layers or 0
    for _ in range(modules):
        total = total.plus(layers[model.kinds[-1]])
    vocab = gpt.padded_vocab_size(routed)
    logits = how.tokens * vocab / how.shape.tp
    product = 6 * logits * model.config.hidden_size / _rate(how, vocab / how.shape.tp)
    return total.plus(NOTHING._replace(compute=product + TRAFFIC * logits * how.width / MEMORY), 1 + modules)


def _rate(how: Use, *sizes: float) -> float:
    """FLOP/s of a matrix product; small sizes cannot fill the machine."""
    rate = MATMUL if how.width == 2 else MATMUL_32
    for size in sizes:
        rate *= size / (size + HALF_RATE)
    return rate


def _layer(model: Pieces, kind: Kind, how: Use, kept: Layer, cluster: Cluster) -> Pass:
    config, shape, tokens = model.config, how.shape, how.tokens
    weights = model.layers[kind]
    dense = sum(weight.size for weight in weights if weight.expert is None)
    keys, pairs = _attention_widths(config, kind)
    products = 2 * tokens * dense / _rate(how, (kind.ffn or config.hidden_size) / shape.tp)
    attention = pairs * tokens * how.sequence_length / shape.tp / ATTENTION
    experts, messages, local = _experts(model, kind, how, cluster)
    traffic = TRAFFIC * (kept.kept + kept.again)
    traffic += ACCUMULATION * (dense + local) if how.weight_copies else 0
    compute = 3 * (products + experts) + (1 + SLOWER_BACKWARD) * attention + traffic / MEMORY
    issued = (LAUNCH_EXPERTS if kind.experts else LAUNCH) + (LAUNCH_CONTEXT if shape.cp > 1 else 0)
    stream = tokens * config.hidden_size * how.width * (shape.tp - 1) / shape.tp / cluster.bandwidth(shape.tp, 1)
    halves = 2 if not kind.experts or config.moe_shared_expert_intermediate_size else 1
    ring = tokens * 2 * keys * how.width / shape.tp * (shape.cp - 1)
    ring /= NVLINK if shape.tp * shape.cp <= cluster.per_node else NETWORK
    return Pass(
        compute=max(compute, issued),
        recompute=_recompute(config, kind, how, (products, attention, experts), 2 * halves * stream, messages / 2),
        tensor=5 * halves * stream,  # two messages forward, three backward, where the gathered input is needed again
        context=max(0.0, ring - attention)
        + max(0.0, 2 * ring - SLOWER_BACKWARD * attention)
        + 2 * (shape.cp - 1) * MESSAGE,
        experts=messages,
    )


def _attention_widths(config: TransformerConfig, kind: Kind) -> tuple[float, float]:
    """Channels of keys (and of values), and FLOPs for each token and position: two products over the causal half."""
    if not kind.groups:
        return 0.0, 0.0
    widths = complete.head_widths(vars(config))
    keys = config.num_attention_heads if isinstance(config, MLATransformerConfig) else kind.groups
    return keys * widths.key, config.num_attention_heads * sum(widths)


def _experts(model: Pieces, kind: Kind, how: Use, cluster: Cluster) -> tuple[float, float, int]:
    """Seconds of a forward pass through the experts, of all their messages, and the weights of the local ones."""
    if not kind.experts:
        return 0.0, 0.0, 0
    config, shape = model.config, how.shape
    held = (config.num_moe_experts or 1) // shape.ep
    one = sum(weight.size for weight in model.layers[kind] if weight.expert == 0)
    chosen = how.tokens / shape.tp * config.moe_router_topk
    routed = chosen * shape.etp
    ffn = config.moe_ffn_hidden_size / shape.etp
    products = 2 * routed * one / _rate(how, routed / held, ffn)
    size = how.tokens / shape.tp * config.hidden_size * how.width
    inside = max(1, min(shape.ep, cluster.per_node // shape.etp))
    share = ((inside - 1) / NVLINK + (shape.ep - inside) / NETWORK) / shape.ep
    moved = config.moe_router_topk if config.moe_token_dispatcher_type != "allgather" else shape.ep
    gathered = size * config.moe_router_topk * (shape.etp - 1) / cluster.bandwidth(shape.etp, 1)
    return max(products, held * one * how.width / MEMORY), 4 * (size * moved * share + gathered), held * one


def _recompute(
    config: TransformerConfig,
    kind: Kind,
    how: Use,
    forward: tuple[float, float, float],
    tensor: float,
    messages: float,
) -> float:
    """Seconds of what backward computes once more, of `forward`: products, attention, experts."""
    _, attention, experts = forward
    if how.full:
        return sum(forward) + tensor + messages
    again = attention if "core_attn" in how.selective else 0.0
    if "mla_up_proj" in how.selective:
        assert isinstance(config, MLATransformerConfig)
        keys = config.qk_head_dim + config.v_head_dim
        up = (config.q_lora_rank or 0) * (config.qk_head_dim + config.qk_pos_emb_head_dim) + config.kv_lora_rank * keys
        again += 2 * how.tokens * config.num_attention_heads / how.shape.tp * up / _rate(how)
    if "moe" in how.selective and kind.experts:
        again += experts + messages
    if "mlp" in how.selective and not kind.experts:
        matrices = 3 if config.gated_linear_unit else 2
        width = kind.ffn / how.shape.tp
        again += 2 * how.tokens * matrices * config.hidden_size * width / _rate(how, width) + tensor / 2
    return again


def _sizes(model: Pieces, how: Use, chunks: Sequence[Chunk]) -> Sizes:
    """Weights of a stage on one process: those that all data-parallel ranks share, and those of parallel experts."""
    parts = [model.sizes(chunk, ep=how.shape.ep) for chunk in chunks]
    dense, experts = (sum(part) for part in zip(*parts, strict=True))
    return Sizes(dense, experts) if how.shape.ep > 1 else Sizes(dense + experts, 0)


def _data_parallel(
    model: Pieces, routed: Routed, how: Use, chunks: Sequence[Chunk], cluster: Cluster, once: float
) -> float:
    """Seconds of reducing gradients and gathering weights that the last backward and the first forward do not hide."""
    shape = how.shape
    gradient = 4 if routed.ddp.get("grad_reduce_in_fp32") else how.width
    expert_ranks = shape.world_size // (shape.pp * shape.ep * shape.etp)
    seconds = 0.0
    for size, ranks, stride in zip(
        _sizes(model, how, chunks), (shape.dp * shape.cp, expert_ranks), (shape.tp, shape.etp * shape.ep), strict=True
    ):
        seconds += size * (ranks - 1) / ranks / cluster.bandwidth(ranks, stride)
    if not routed.ddp.get("use_distributed_optimizer"):
        return 2 * gradient * seconds
    reduce, gather = gradient * seconds, how.width * seconds
    if not routed.ddp.get("overlap_grad_reduce"):
        return reduce + gather
    least = 1 - HIDDEN
    return max(least * reduce, reduce - HIDDEN * once * 2 / 3) + max(least * gather, gather - HIDDEN * once / 3)


def _update(model: Pieces, routed: Routed, how: Use, chunks: Sequence[Chunk]) -> float:
    dense, apart = _sizes(model, how, chunks)
    shape = how.shape
    if routed.ddp.get("use_distributed_optimizer"):
        dense //= shape.dp * shape.cp
        apart //= shape.world_size // (shape.pp * shape.ep * shape.etp)
    return UPDATE * (dense + apart) / MEMORY
