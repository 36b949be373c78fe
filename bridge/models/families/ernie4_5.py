"""ERNIE 4.5, dense: Llama's shape with rotated pairs of neighbouring channels, and biases everywhere or nowhere."""

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import attention_shape, same
from bridge.models.hf.rope import HF_NAMES, rope

# transformers' class has no attention_dropout, and another base of the rotary embedding.
REPLACED = (HF_NAMES, ("attention_dropout",))
DECODER_PARTS = (*(part for part in DECODER if part.hf_names not in REPLACED), rope(theta=500000.0))

FAMILY = Family(
    architecture="Ernie4_5ForCausalLM",
    model_type="ernie4_5",
    hf_defaults={
        **{name: value for name, value in HF_DEFAULTS.items() if name != "attention_dropout"},
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    parts=(
        *DECODER_PARTS,
        attention_shape(),
        same("use_bias", "add_bias_linear", bool),
    ),
    constants={**CONSTANTS, "add_qkv_bias": False, "attention_dropout": 0.0, "rotary_interleaved": True},
    rows=llama_table,
    aliases=("Ernie4_5_ForCausalLM",),
)
