"""Rows of the parts of a decoder, under the names most Hugging Face decoders use. A family composes its table of them
and adds, or names differently, what is its own. {0} in a name is weight or bias.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from bridge.weights.ops import Joined, Op, Qkv, Stack, Transposed
from bridge.weights.table import Ignore, Row, Table

Rows = list[Row | Ignore]
Model = Mapping[str, Any]  # the complete `model` keys (`config.complete`)

MCORE = "decoder.layers.{layer}."
HF = "model.layers.{layer}."
EMBEDDING = "model.embed_tokens.weight"
WEIGHT, BOTH = ("weight",), ("weight", "bias")


def llama_table(model: Model) -> Table:
    """The table of a Llama-shaped model."""
    return Table([*embedding(model), *norms(model), *qk_norms(model), *attention(model), *mlp(model), *final(model)])


def embedding(model: Model, *, name: str = EMBEDDING, output: str = "lm_head.weight") -> Rows:
    """The token embedding, and the output layer if it is another matrix."""
    rows: Rows = [Row("embedding.word_embeddings.weight", name)]
    if model["share_embeddings_and_output_weights"]:
        return [*rows, Ignore(output, "the output layer is the embedding", same_as=name)]
    return [*rows, Row("output_layer.weight", output)]


def norms(
    model: Model,
    *,
    attention: str | None = "input_layernorm",
    mlp: str | None = "post_attention_layernorm",
    prefix: str = HF,
    mcore: str = MCORE,
) -> Rows:
    """The norms before attention and before a dense MLP, by the names Transformer Engine gives them; None: no row."""
    kinds = BOTH if model["normalization"] == "LayerNorm" else WEIGHT
    places = {"self_attention.linear_qkv.layer_norm_": attention, "mlp.linear_fc1.layer_norm_": mlp}
    return [
        Row(f"{mcore}{key}{kind}", f"{prefix}{name}.{kind}") for key, name in places.items() if name for kind in kinds
    ]


def output_norms(model: Model, *, attention: str, mlp: str, prefix: str = HF) -> Rows:
    """The norms behind attention and behind a dense MLP (`norm_placement` post or sandwich)."""
    kinds = BOTH if model["normalization"] == "LayerNorm" else WEIGHT
    places = {"self_attention.linear_proj": attention, "mlp.linear_fc2": mlp}
    return [
        Row(f"{MCORE}{key}.post_layernorm.{kind}", f"{prefix}{name}.{kind}")
        for key, name in places.items()
        for kind in kinds
    ]


def qk_norms(model: Model, *, query: str = "self_attn.q_norm", key: str = "self_attn.k_norm", prefix: str = HF) -> Rows:
    """The norms of queries and keys, where the model has them."""
    if not model["qk_layernorm"] and not model["qk_layernorm_full_width"]:
        return []
    names = {"self_attention.q_layernorm.weight": query, "self_attention.k_layernorm.weight": key}
    return [Row(MCORE + ours, f"{prefix}{theirs}.weight") for ours, theirs in names.items()]


def attention(
    model: Model,
    *,
    qkv: Iterable[str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output: str = "self_attn.o_proj",
    prefix: str = HF,
) -> Rows:
    """The four projections of attention with grouped queries; their biases where the model has them.

    One name in `qkv` is a tensor of query above key above value. Layers with unequal numbers of groups have rows of
    their own.
    """
    heads, channels, own = (model[key] for key in ("num_attention_heads", "kv_channels", "add_attention_bias"))
    bias = bool(model["add_bias_linear"] if own is None else own)
    by_layer = model["num_query_groups_by_layer"]
    rows: Rows = []
    for layer, groups in enumerate(by_layer) if by_layer else [("{layer}", model["num_query_groups"])]:
        if groups:
            op: Op = Qkv(heads, groups, channels)
            hf, mcore = (name.replace("{layer}", str(layer)) for name in (prefix, MCORE + "self_attention."))
            names = tuple(f"{hf}{name}.{{0}}" for name in qkv)
            if len(names) == 1:
                op = Joined(op, (heads * channels, groups * channels, groups * channels))
            rows += linear(mcore + "linear_qkv.{0}", names, op, bias=bias or model["add_qkv_bias"])
            rows += linear(mcore + "linear_proj.{0}", f"{hf}{output}.{{0}}", bias=bias)
    return [*rows, Ignore(prefix + "self_attn.rotary_emb.inv_freq", "a buffer of old files; computed from the config")]


def mlp(
    model: Model,
    *,
    fc1: Iterable[str] = ("mlp.gate_proj", "mlp.up_proj"),
    fc2: str = "mlp.down_proj",
    prefix: str = HF,
    mcore: str = MCORE + "mlp.",
) -> Rows:
    """A dense MLP: one part of fc1, or two (gate above up) where it is gated; biases where the model has them."""
    names = tuple(f"{prefix}{name}.{{0}}" for name in fc1)
    op = Stack(len(names)) if len(names) > 1 else None
    bias = model["add_bias_linear"]
    return [
        *linear(mcore + "linear_fc1.{0}", names, op, bias=bias),
        *linear(mcore + "linear_fc2.{0}", f"{prefix}{fc2}.{{0}}", bias=bias),
    ]


def final(model: Model, *, name: str = "model.norm") -> Rows:
    """The norm behind the last layer."""
    kinds = BOTH if model["normalization"] == "LayerNorm" else WEIGHT
    return [Row(f"decoder.final_layernorm.{kind}", f"{name}.{kind}") for kind in kinds]


def transposed(rows: Rows) -> Rows:
    """The same rows for files that keep weights as `[in, out]`."""
    return [
        Row(row.mcore_key, row.hf_names, Transposed(row.op), keep_dtype=row.keep_dtype) if isinstance(row, Row) else row
        for row in rows
    ]


def linear(key: str, names: str | tuple[str, ...], op: Op | None = None, *, bias: bool) -> Rows:
    """The weight of a linear layer, and its bias where it has one."""
    names = (names,) if isinstance(names, str) else names
    return [
        Row(key.format(kind, layer="{layer}", expert="{expert}"), _of_kind(names, kind), op)
        for kind in (BOTH if bias else WEIGHT)
    ]


def _of_kind(names: Iterable[str], kind: str) -> tuple[str, ...]:
    return tuple(name.format(kind, layer="{layer}", expert="{expert}") for name in names)
