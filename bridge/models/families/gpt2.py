"""GPT-2: learned positions, LayerNorm, biases everywhere, weights stored as [in, out], query, key and value in one
tensor. Files on the hub name their tensors as GPT2Model does, files that transformers writes as GPT2LMHeadModel."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from bridge.config.complete import mlp_width
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, mlp, norms, transposed
from bridge.models.hf.fields import Part, Values, activation, dropout, only, refused, same
from bridge.weights.table import Ignore, Row, Table


def heads() -> Part:
    """n_head heads, each with keys and values of its own; they share n_embd channels."""

    def read(hf: Values) -> dict[str, Any]:
        count, hidden = int(hf["n_head"]), int(hf["n_embd"])
        if hidden % count:
            raise refused("n_head", count, f"it does not divide n_embd, {hidden}")
        return {"num_attention_heads": count, "num_query_groups": count, "kv_channels": hidden // count}

    def write(model: Values) -> dict[str, Any]:
        count, wanted = model["num_attention_heads"], read({"n_head": model["num_attention_heads"], **_hidden(model)})
        for key, value in wanted.items():
            if model[key] != value:
                raise refused(f"model.{key}", model[key], f"a GPT-2 with {count} heads has {value}")
        return {"n_head": count}

    return Part(("n_head",), ("num_attention_heads", "num_query_groups", "kv_channels"), read, write)


def _hidden(model: Values) -> dict[str, int]:
    return {"n_embd": model["hidden_size"]}


def inner_width() -> Part:
    """n_inner; null is what megatron-core takes as well."""

    def read(hf: Values) -> dict[str, Any]:
        return {"ffn_hidden_size": hf.get("n_inner") or mlp_width(hf["n_embd"])}

    def write(model: Values) -> dict[str, Any]:
        width = model["ffn_hidden_size"]
        return {"n_inner": None if width == mlp_width(model["hidden_size"]) else width}

    return Part(("n_inner",), ("ffn_hidden_size",), read, write)


def attention_scale() -> Part:
    """scale_attn_weights: logits are divided by the root of the channels, or not at all."""

    def write(model: Values) -> dict[str, Any]:
        scale, usual = model["softmax_scale"], 1 / math.sqrt(model["kv_channels"])
        if scale not in (None, 1.0, usual):
            raise refused("model.softmax_scale", scale, f"a GPT-2 has {usual:g} or 1")
        return {"scale_attn_weights": scale != 1.0}

    return Part(
        ("scale_attn_weights",),
        ("softmax_scale",),
        lambda hf: {} if hf["scale_attn_weights"] else {"softmax_scale": 1.0},
        write,
    )


def rows(model: Model, *, prefix: str = "transformer.") -> Table:
    layer = prefix + "h.{layer}."
    return Table(
        [
            *embedding(model, name=f"{prefix}wte.weight"),
            Row("embedding.position_embeddings.weight", f"{prefix}wpe.weight"),
            *norms(model, attention="ln_1", mlp="ln_2", prefix=layer),
            *transposed(attention(model, qkv=("attn.c_attn",), output="attn.c_proj", prefix=layer)),
            *transposed(mlp(model, fc1=("mlp.c_fc",), fc2="mlp.c_proj", prefix=layer)),
            *final(model, name=f"{prefix}ln_f"),
            Ignore(f"{layer}attn.bias", "the causal mask, which old files hold"),
            Ignore(f"{layer}attn.masked_bias", "the logit of a masked pair, which old files hold"),
        ]
    )


SPELLINGS: dict[str, Callable[[Model], Table]] = {"without transformer.": partial(rows, prefix="")}

FAMILY = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    hf_defaults={
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
    },
    parts=(
        same("n_layer", "num_layers"),
        same("n_embd", "hidden_size"),
        inner_width(),
        same("vocab_size", "vocab_size"),
        same("n_positions", "max_sequence_length"),
        same("tie_word_embeddings", "share_embeddings_and_output_weights", bool),
        activation("activation_function", prefer="gelu_new"),
        same("layer_norm_epsilon", "layernorm_epsilon", float),
        same("attn_pdrop", "attention_dropout", float),
        same("initializer_range", "init_method_std", float),
        heads(),
        attention_scale(),
        dropout("resid_pdrop", "embd_pdrop"),
        only("scale_attn_by_inverse_layer_idx", False),
        only("reorder_and_upcast_attn", False),
    ),
    constants={
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "add_qkv_bias": False,
    },
    rows=rows,
    spellings=SPELLINGS,
)
