"""Gemma: Llama's shape with scaled embeddings, norm weights stored less one, and GELU in its tanh form."""

import math
from typing import Any

from bridge.errors import shown
from bridge.models.families.llama import CONSTANTS as LLAMA
from bridge.models.families.llama import SHAPE_AND_TRAINING
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import (
    Part,
    Values,
    activation,
    attention_and_mlp_bias,
    attention_shape,
    only,
    refused,
    unread,
)
from bridge.models.hf.rope import rope


def scaled_embeddings() -> Part:
    """Embeddings are multiplied by sqrt(hidden_size), which no field says."""

    def write(model: Values) -> dict[str, Any]:
        if model["embedding_multiplier"] != math.sqrt(model["hidden_size"]):
            wanted = math.sqrt(model["hidden_size"])
            raise refused("model.embedding_multiplier", model["embedding_multiplier"], f"this family has {wanted}")
        return {}

    return Part((), ("embedding_multiplier",), lambda hf: {"embedding_multiplier": math.sqrt(hf["hidden_size"])}, write)


def activation_of_gemma() -> Part:
    """`hidden_act`, of which transformers reads gelu, as the first files have it, as the tanh form too.

    Some files repeat it as `hidden_activation`, which today's class does not read but earlier ones preferred.
    """
    plain = activation()

    def read(hf: Values) -> dict[str, Any]:
        said = [hf["hidden_act"], hf.get("hidden_activation")]
        acts = {"gelu_pytorch_tanh" if name == "gelu" else name for name in said if name is not None}
        if len(acts) > 1:
            raise refused("hidden_activation", said[1], f"hidden_act is {shown(said[0])}; make them equal")
        return plain.read({"hidden_act": acts.pop()})

    def write(model: Values) -> dict[str, Any]:
        if model["activation_func"] == "gelu":
            raise refused("model.activation_func", "gelu", "transformers takes gelu_tanh for it in this family")
        return plain.write(model)

    return Part(("hidden_act", "hidden_activation"), ("activation_func",), read, write)


PARTS = (
    *SHAPE_AND_TRAINING,
    attention_shape(),
    scaled_embeddings(),
    attention_and_mlp_bias(mlp_field=None),
    only("use_bidirectional_attention", None, False),
    unread("cache_implementation"),  # of generation
)
CONSTANTS = {**LLAMA, "layernorm_zero_centered_gamma": True, "add_qkv_bias": False}
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}

FAMILY = Family(
    architecture="GemmaForCausalLM",
    model_type="gemma",
    hf_defaults={**DEFAULTS, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    parts=(*PARTS, activation_of_gemma(), rope()),
    constants=CONSTANTS,
    rows=llama_table,
)
