"""Mistral 7B and its successors: Llama's shape with a sliding window over all layers."""

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import attention_shape, window_everywhere

FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    hf_defaults={
        **HF_DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    parts=(*DECODER, attention_shape(), window_everywhere()),
    constants={**CONSTANTS, "add_bias_linear": False, "add_qkv_bias": False},
    rows=llama_table,
)
