"""Table rows for decoders of Llama's shape; a family adds or leaves out what differs."""

from collections.abc import Mapping
from typing import Any

from bridge.weights.ops import Qkv, Stack
from bridge.weights.table import Ignore, Row, Table

MCORE = "decoder.layers.{layer}."
HF = "model.layers.{layer}."
# Canonical key -> Hugging Face names, of the tensors of every layer. {0} is weight or bias.
PROJECTIONS = {
    "self_attention.linear_qkv.{0}": tuple(f"self_attn.{name}_proj.{{0}}" for name in "qkv"),
    "self_attention.linear_proj.{0}": ("self_attn.o_proj.{0}",),
    "mlp.linear_fc1.{0}": ("mlp.gate_proj.{0}", "mlp.up_proj.{0}"),
    "mlp.linear_fc2.{0}": ("mlp.down_proj.{0}",),
}
NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
QK_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
EMBEDDING = "model.embed_tokens.weight"


def llama_table(model: Mapping[str, Any]) -> Table:
    """The table of a Llama-shaped model whose `model` keys are complete (`family.complete`)."""
    bias = {
        "self_attention.linear_qkv.{0}": _attention_bias(model) or model["add_qkv_bias"],
        "self_attention.linear_proj.{0}": _attention_bias(model),
        "mlp.linear_fc1.{0}": model["add_bias_linear"],
        "mlp.linear_fc2.{0}": model["add_bias_linear"],
    }
    rows: list[Row | Ignore] = [Row("embedding.word_embeddings.weight", EMBEDDING)]
    rows += [Row(MCORE + key, HF + name) for key, name in NORMS.items()]
    if model["qk_layernorm"]:
        rows += [Row(MCORE + key, HF + name) for key, name in QK_NORMS.items()]
    for key, names in PROJECTIONS.items():
        for kind in ("weight", "bias") if bias[key] else ("weight",):
            rows.append(_projection(model, key.format(kind), tuple(HF + name.format(kind) for name in names)))
    rows.append(Row("decoder.final_layernorm.weight", "model.norm.weight"))
    if model["share_embeddings_and_output_weights"]:
        rows.append(Ignore("lm_head.weight", "the output layer is the embedding", same_as=EMBEDDING))
    else:
        rows.append(Row("output_layer.weight", "lm_head.weight"))
    rows.append(Ignore(HF + "self_attn.rotary_emb.inv_freq", "a buffer old files hold; computed from the config"))
    return Table(rows)


def _projection(model: Mapping[str, Any], key: str, names: tuple[str, ...]) -> Row:
    if len(names) == 3:
        shape = Qkv(model["num_attention_heads"], model["num_query_groups"], model["kv_channels"])
        return Row(MCORE + key, names, shape)
    return Row(MCORE + key, names, Stack() if len(names) == 2 else None)


def _attention_bias(model: Mapping[str, Any]) -> bool:
    own = model["add_attention_bias"]
    return bool(model["add_bias_linear"] if own is None else own)
