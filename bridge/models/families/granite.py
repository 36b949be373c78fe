"""Granite 3: Llama's shape with four constants, on the embedding, the attention scores, the branches and the logits."""

import math
from typing import Any

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import Part, Values, attention_and_mlp_bias, attention_shape, same


def softmax_scale() -> Part:
    """`attention_multiplier` takes the place of 1 / sqrt(channels), megatron-core's scale where none is set."""

    def write(model: Values) -> dict[str, Any]:
        scale = model["softmax_scale"]
        return {"attention_multiplier": float(1 / math.sqrt(model["kv_channels"]) if scale is None else scale)}

    names = ("attention_multiplier",), ("softmax_scale",)
    return Part(*names, lambda hf: {"softmax_scale": float(hf["attention_multiplier"])}, write)


MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")

FAMILY = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    hf_defaults={
        **HF_DEFAULTS,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": 1.0,
        **dict.fromkeys(MULTIPLIERS, 1.0),
    },
    parts=(
        *DECODER,
        attention_shape(has_head_dim=False),
        attention_and_mlp_bias(mlp_field="mlp_bias"),
        softmax_scale(),
        *(same(name, name, float) for name in MULTIPLIERS),
    ),
    constants=CONSTANTS,
    rows=llama_table,
)
