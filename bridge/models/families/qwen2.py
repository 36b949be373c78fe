"""Qwen2 and Qwen2.5: Llama's shape with biases on query, key and value, and windows in upper layers if switched on."""

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import attention_shape, window_by_layer

QWEN_DEFAULTS = {
    **HF_DEFAULTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    hf_defaults=QWEN_DEFAULTS,
    parts=(*DECODER, attention_shape(has_head_dim=False), window_by_layer()),
    constants={**CONSTANTS, "add_bias_linear": False, "add_qkv_bias": True},
    rows=llama_table,
)
