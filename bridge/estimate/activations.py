"""Bytes that forward passes keep for their backward passes on one process, and what backward itself needs.

By layer and token as in Korthikanti et al. 2022 (arXiv 2205.05198), section 4, brought up to date with what the modules
of megatron-core 0.16.1 keep: no kernel used here stores the attention matrix. Two sets of kernels differ: Transformer
Engine's (`fused`: norms, rotary embedding and activation functions save their inputs at most), and torch's.
"""

from typing import NamedTuple

from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge.config.layout import Layout
from bridge.config.routing import Routed

ROUTER_BYTES = 16  # for each token and expert: float32 logits, scores, probabilities, and booleans of the choice


class Use(NamedTuple):
    """What activations depend on besides the model. tokens: of a micro-batch on one process, before TP divides them."""

    tokens: int
    sequence_length: int  # of a whole sequence
    width: int  # bytes of a number
    fused: bool  # Transformer Engine's kernels
    full: bool  # recompute_granularity
    selective: frozenset[str]  # recompute_modules
    weight_copies: bool  # a weight's gradient is a tensor of its own before it is added to the buffer
    fused_loss: bool
    fused_activation: bool
    rotary: bool  # queries and keys are rotated
    parts: int  # of the residual stream, divided by sequence parallelism (section 4.2.2)
    shape: Layout


class Layer(NamedTuple):
    """Bytes of one layer and micro-batch. `kept` until its backward pass; `again`: what backward computes once more and
    keeps meanwhile; `input`: the residual stream alone; `working`: the most gradients there are at a time."""

    kept: float
    again: float
    input: float
    working: float


class Head(NamedTuple):
    """Bytes of the final norm, logits and loss: kept, and the most that is added while loss and backward run."""

    kept: float
    working: float


class _Part(NamedTuple):
    """Bytes of a norm or branch. `again`: of those kept, what selective recomputation leaves out."""

    kept: float
    again: float
    working: float = 0.0


def use(routed: Routed, shape: Layout, *, sequence_length: int, micro_batch_size: int, fused: bool) -> Use:
    """`sequence_length` in tokens, `micro_batch_size` in sequences."""
    fields = routed.transformer
    half = fields.get("bf16") or fields.get("fp16") or routed.get("params_dtype") != "fp32"
    granularity = fields.get("recompute_granularity")
    modules = fields.get("recompute_modules") or ["core_attn"]
    swiglu = fields.get("activation_func") == "silu" and fields.get("gated_linear_unit", False)
    clamped = fields.get("activation_func_clamp_value") or fields.get("glu_linear_offset")
    return Use(
        tokens=micro_batch_size * sequence_length // shape.cp,
        sequence_length=sequence_length,
        width=2 if half else 4,
        fused=fused,
        full=granularity == "full",
        selective=frozenset(modules if granularity == "selective" else ()),
        weight_copies=not fields.get("gradient_accumulation_fusion"),
        fused_loss=fused and fields.get("cross_entropy_loss_fusion", True),
        fused_activation=fused and fields.get("bias_activation_fusion", swiglu and not clamped),
        rotary=routed.gpt.get("position_embedding_type") == "rope",
        parts=shape.tp if fields.get("sequence_parallel") else 1,
        shape=shape,
    )


def layer(model: TransformerConfig, how: Use, *, experts: bool, groups: int, ffn: int) -> Layer:
    """One decoder layer: with experts or a dense MLP, `groups` key-value groups, `ffn` channels; 0: no such branch."""
    stream = how.tokens * model.hidden_size * how.width / how.parts
    parts: list[_Part] = []
    if groups:
        latent = isinstance(model, MLATransformerConfig)
        parts.append(_norm(model, how, stream, separate=latent or not how.fused))
        parts.append(_latent_attention(model, how) if latent else _attention(model, how, groups))
    if ffn:
        norm = _norm(model, how, stream, separate=experts or not how.fused)
        mlp = _experts(model, how) if experts else _mlp(model, how, ffn)
        if ("moe" if experts else "mlp") in how.selective:
            # The norm is inside what is recomputed where it is fused into the first product.
            norm = norm if experts or not how.fused else norm._replace(again=norm.kept - stream)
            mlp = mlp._replace(again=mlp.kept)
        parts += [norm, mlp]
    kept = sum(part.kept for part in parts)
    if model.hidden_dropout > 0:
        kept += 2 * stream / (how.width if how.fused else 1)  # masks: of bytes, or of the numbers' own width
    again = sum(part.again for part in parts)
    working = max((part.working for part in parts), default=0.0) + 2 * stream
    return Layer(kept=kept - again, again=again, input=stream, working=working)


def prediction(model: TransformerConfig, how: Use, inside: Layer) -> Layer:
    """A module that predicts a further token: `inside` behind two norms and a projection, before one more norm."""
    stream = inside.input
    norms = (2 * 2 + 1 + 3 * _normalised(model, how)) * stream  # the first two's outputs go into the joined input below
    joined = 2 * stream
    return inside._replace(kept=inside.kept + norms + joined)


def head(model: TransformerConfig, how: Use, *, vocab: int) -> Head:
    """The final norm, `vocab` logits per token (padded, of the whole model) and their loss, which each prediction
    module has as well.

    Transformer Engine's fused loss leaves the gradient in the logits themselves; megatron-core's keeps a float32
    softmax (tensor_parallel/cross_entropy.py), beside which 16-bit logits or their gradient exist for a moment.
    """
    stream = how.tokens * model.hidden_size * how.width / how.parts
    logits = how.tokens * vocab / how.shape.tp
    times = 1 + (model.mtp_num_layers or 0)
    norm = (2 + _normalised(model, how)) * stream
    loss = logits * (how.width if how.fused_loss else 4)
    if getattr(model, "final_logit_softcapping", None) is not None:
        loss += logits * how.width  # tanh
    moment = 0.0 if how.fused_loss or how.width == 4 else logits * how.width
    weight = vocab / how.shape.tp * model.hidden_size * how.width if how.weight_copies else 0.0
    return Head(kept=norm + times * loss, working=moment + weight + how.tokens * model.hidden_size * how.width)


def _norm(model: TransformerConfig, how: Use, stream: float, *, separate: bool) -> _Part:
    """A norm's input and output; a second norm after the branch (norm_placement sandwich) has an input of its own. One
    that comes after only keeps as much as one before."""
    kept = 2 + _normalised(model, how)
    if getattr(model, "norm_placement", "pre") == "sandwich":
        kept += 1 + _normalised(model, how)
    again = 1 + _normalised(model, how) if separate and "layernorm" in how.selective else 0
    return _Part(kept * stream, again * stream)


def _normalised(model: TransformerConfig, how: Use) -> int:
    """Times the stream: what torch's RMSNorm keeps besides its input and output. That is the normalised input, and of
    16-bit numbers both inputs in float32 instead of the first."""
    if how.fused or model.normalization == "LayerNorm":
        return 0
    return 1 if how.width == 4 else 3


def _attention(model: TransformerConfig, how: Use, groups: int) -> _Part:
    """Attention with `groups` key-value groups.

    Rotated queries and keys, values, the result, and the softmax's float32 statistics. Values lie in the fused QKV
    output; Transformer Engine copies them out of it, torch's kernels and a checkpoint keep all of it.
    """
    tp, channels = how.shape.tp, model.kv_channels
    assert channels is not None
    queries = model.num_attention_heads * channels / tp
    keys = max(groups / tp, 1) * channels
    rotary = queries + keys if how.rotary else 0.0  # not what they were before
    numbers = 2 * queries + 2 * keys
    if how.fused and "core_attn" in how.selective:
        numbers += rotary
    if not how.fused:
        numbers += rotary if how.shape.cp == 1 else 2 * keys * (how.shape.cp - 1)
    if model.qk_layernorm:
        numbers += queries + keys if how.fused else 2 * queries + keys
    kept = how.tokens * (numbers * how.width + 4 * model.num_attention_heads / tp)
    return _Part(kept + _scores(model, how), 0.0, working=how.tokens * (2 * queries + 4 * keys) * how.width)


def _scores(model: TransformerConfig, how: Use) -> float:
    """Capped scores are computed by no fused kernel: tanh and softmax in float32, the latter also in 16 bits if the
    values are. With context parallelism torch's kernels keep the mask."""
    pairs = how.tokens * how.sequence_length
    if getattr(model, "attn_logit_softcapping", None) is not None and "core_attn" not in how.selective:
        return pairs * model.num_attention_heads / how.shape.tp * (8 if how.width == 4 else 10)
    return pairs * how.width if how.shape.cp > 1 and not how.fused else 0.0


def _latent_attention(model: TransformerConfig, how: Use) -> _Part:
    """Multi-latent attention: the latents before and after their norms, on every tensor rank unless the sequence is
    divided; queries and keys joined of their two parts, values, the result.

    Values narrower than keys make torch on a CPU, but not on a GPU, keep the attention matrix, which is not counted.
    """
    assert isinstance(model, MLATransformerConfig)
    ranks = model.kv_lora_rank + (model.q_lora_rank or 0)
    shared = model.qk_pos_emb_head_dim + ranks * (2 + _normalised(model, how))
    shared /= how.parts
    heads = model.num_attention_heads / how.shape.tp
    width = model.qk_head_dim + model.qk_pos_emb_head_dim
    values = model.v_head_dim if how.fused else model.qk_head_dim + model.v_head_dim  # with what they were split from
    up = heads * (2 * width + values)
    kept = how.tokens * ((shared + up + heads * model.v_head_dim) * how.width + 4 * heads)
    again = how.tokens * up * how.width if "mla_up_proj" in how.selective else 0.0
    working = how.tokens * heads * (2 * width + 2 * model.v_head_dim) * how.width
    return _Part(kept, again, working)


def _activation(model: TransformerConfig, how: Use, *, scaled: bool) -> float:
    """Times the MLP's width: outputs of the first product, and what the activation function keeps up to the input of
    the second. `scaled`: an expert's, multiplied by a token's weight."""
    if how.fused_activation:
        return 3.0 if model.gated_linear_unit else 2.0
    factor = 5.0 if model.gated_linear_unit else 2.0  # both halves, the activated half, a copy of the other, product
    factor += 1.0 if model.activation_func in (quick_gelu, squared_relu) else 0.0
    return factor + (1.0 if scaled else 0.0) + (1.0 if model.activation_func_clamp_value is not None else 0.0)


def _mlp(model: TransformerConfig, how: Use, ffn: int) -> _Part:
    width = ffn / how.shape.tp
    matrices = 2 if model.gated_linear_unit else 1
    copies = width * matrices * model.hidden_size * how.width if how.weight_copies else 0.0
    working = how.tokens * (matrices + 1) * width * how.width + copies
    return _Part(how.tokens * _activation(model, how, scaled=False) * width * how.width, 0.0, working)


def _experts(model: TransformerConfig, how: Use) -> _Part:
    """Router, experts and shared experts, for tokens spread evenly over the experts.

    Each of a process's tokens comes `topk` times to some process, as its expert's input (token_dispatcher.py). With
    expert tensor parallelism the processes of an expert see each other's tokens as well.
    """
    shape, matrices = how.shape, 2 if model.gated_linear_unit else 1
    tokens = how.tokens / how.parts
    routed = tokens * model.moe_router_topk * shape.etp * _capacity(model)
    ffn = model.moe_ffn_hidden_size / shape.etp
    activated = _activation(model, how, scaled=True)
    activation = routed * (activated - matrices) * ffn * how.width
    experts = routed * (model.hidden_size * how.width + matrices * ffn * how.width + 4) + activation
    router = tokens * model.num_moe_experts * ROUTER_BYTES
    if model.moe_token_dispatcher_type == "allgather":
        router *= shape.etp * shape.ep  # every process sees the choices of all
    width = (model.moe_shared_expert_intermediate_size or 0) / shape.tp
    shared = how.tokens * _activation(model, how, scaled=False) * width * how.width
    again = activation if "moe_act" in how.selective else 0.0
    again += shared if "shared_experts" in how.selective else 0.0
    working = routed * ((matrices + 1) * ffn + 2 * model.hidden_size) * how.width
    if model.moe_token_dispatcher_type == "allgather":
        working += tokens * shape.etp * shape.ep * model.hidden_size * how.width
    return _Part(experts + router + shared, again, working)


def _capacity(model: TransformerConfig) -> float:
    """How many of a token's choices an expert takes, and pads to, for each that even routing would send."""
    factor = model.moe_expert_capacity_factor
    if factor is None:
        return 1.0
    return factor if model.moe_pad_expert_input_to_capacity else min(factor, 1.0)
