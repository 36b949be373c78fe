"""Rows of layers with experts, in models that may have dense layers among them.

Each expert is an entry of a stacked megatron tensor, in files one tensor per expert or, with `fused_experts`, an entry
of a stacked tensor there too, as transformers keeps them in memory and may write them (`save_original_format=False`).
"""

from bridge.config.complete import moe_layers
from bridge.models.hf.decoder_rows import (
    BOTH,
    HF,
    MCORE,
    WEIGHT,
    Model,
    Rows,
    attention,
    embedding,
    final,
    linear,
    mlp,
    norms,
    qk_norms,
)
from bridge.weights.ops import Op, Stack
from bridge.weights.table import Row, Table

EXPERTS = MCORE + "mlp.experts.experts."
SHARED = MCORE + "mlp.shared_experts."
# One expert's part of fc1 (gate above up) and fc2.
FC1 = ("mlp.experts.{expert}.gate_proj.{0}", "mlp.experts.{expert}.up_proj.{0}")
FC2 = "mlp.experts.{expert}.down_proj.{0}"
FUSED_FC1, FUSED_FC2 = ("mlp.experts.gate_up_proj[{expert}]",), "mlp.experts.down_proj[{expert}]"


def moe_table(model: Model, *, fused_experts: bool = False, shared: str = "mlp.shared_experts") -> Table:
    """The table of a Llama-shaped model with experts under the names most families have."""
    return Table([*embedding(model), *moe_layer(model, fused_experts=fused_experts, shared=shared), *final(model)])


def moe_layer(
    model: Model, *, fused_experts: bool = False, shared: str = "mlp.shared_experts", fp32_router: bool = False
) -> Rows:
    """The rows of such a model's layers; `shared` is the name of the expert of every token, where there is one."""
    return [
        *norms(model, mlp=None),
        *mlp_norms(model),
        *qk_norms(model),
        *attention(model),
        *dense_mlp(model),
        *router(model, fp32_weight=fp32_router),
        *experts(model, fused_experts=fused_experts),
        *shared_experts(model, name=shared),
    ]


def mlp_norms(model: Model, name: str = "post_attention_layernorm", *, prefix: str = HF, mcore: str = MCORE) -> Rows:
    """The norm before the MLP or the experts. megatron-core has two keys for it, so that where both kinds of layers
    exist each layer has a row of its own."""
    kinds = BOTH if model["normalization"] == "LayerNorm" else WEIGHT
    layers = moe_layers(model)
    if len(set(layers)) == 1:
        places = {"{layer}": layers[0]}
    else:
        places = {str(layer): with_experts for layer, with_experts in enumerate(layers)}
    keys = {False: "mlp.linear_fc1.layer_norm_", True: "pre_mlp_layernorm."}
    return [
        Row(
            mcore.replace("{layer}", layer) + keys[with_experts] + kind,
            f"{prefix}{name}.{kind}".replace("{layer}", layer),
        )
        for layer, with_experts in places.items()
        for kind in kinds
    ]


def dense_mlp(model: Model) -> Rows:
    """The MLP of the dense layers, where there are any."""
    return [] if all(moe_layers(model)) else mlp(model)


def router(
    model: Model,
    *,
    weight: str = "mlp.gate.weight",
    bias: str = "mlp.gate.bias",
    expert_bias: str = "mlp.gate.e_score_correction_bias",
    expert_bias_op: Op | None = None,
    fp32_weight: bool = False,
    prefix: str = HF,
    mcore: str = MCORE,
) -> Rows:
    """The router's matrix, the bias on its logits, and the bias that only takes part in the choice of experts.

    The latter and, with `fp32_weight`, the matrix are kept in fp32 by transformers (`_keep_in_fp32_modules_strict`).
    """
    rows: Rows = [Row(f"{mcore}mlp.router.weight", prefix + weight, keep_dtype=fp32_weight)]
    if model["add_bias_linear"]:
        rows.append(Row(f"{mcore}mlp.router.bias", prefix + bias))
    if model["moe_router_enable_expert_bias"]:
        rows.append(Row(f"{mcore}mlp.router.expert_bias", prefix + expert_bias, expert_bias_op, keep_dtype=True))
    return rows


def experts(
    model: Model,
    *,
    fc1: tuple[str, ...] = FC1,
    fc2: str = FC2,
    fused_experts: bool = False,
    prefix: str = HF,
    mcore: str = EXPERTS,
) -> Rows:
    """The experts; `fused_experts` sets the names that transformers has for stacks of them, which have no biases."""
    if fused_experts:
        fc1, fc2 = FUSED_FC1, FUSED_FC2
    bias = model["add_bias_linear"]
    op = Stack(len(fc1)) if len(fc1) > 1 else None
    return [
        *linear(mcore + "linear_fc1.{0}[{expert}]", tuple(prefix + name for name in fc1), op, bias=bias),
        *linear(mcore + "linear_fc2.{0}[{expert}]", prefix + fc2, bias=bias),
    ]


def shared_experts(
    model: Model,
    *,
    name: str = "mlp.shared_experts",
    gate: str = "mlp.shared_expert_gate.weight",
    prefix: str = HF,
    mcore: str = SHARED,
) -> Rows:
    """The expert of every token, where there is one, and the gate on its output."""
    if not model["moe_shared_expert_intermediate_size"]:
        return []
    rows = mlp(model, fc1=(f"{name}.gate_proj", f"{name}.up_proj"), fc2=f"{name}.down_proj", prefix=prefix, mcore=mcore)
    return [*rows, Row(f"{mcore}gate_weight", prefix + gate)] if model["moe_shared_expert_gate"] else rows
