"""Qwen3, dense: Qwen2 with normalised queries and keys, its own head width, and attention biases only if asked for."""

from bridge.models.families.llama import CONSTANTS, DECODER
from bridge.models.families.qwen2 import QWEN_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import attention_and_mlp_bias, attention_shape, window_by_layer

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    hf_defaults={**QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
    parts=(*DECODER, attention_shape(), attention_and_mlp_bias(mlp_field=None), window_by_layer()),
    constants={**CONSTANTS, "qk_layernorm": True},
    rows=llama_table,
)
