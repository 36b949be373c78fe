"""Seed-OSS: Llama's shape with its own head width, biases on query, key and value alone, and dropout in training."""

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import attention_and_mlp_bias, attention_shape, same

FAMILY = Family(
    architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    hf_defaults={
        **HF_DEFAULTS,
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    },
    parts=(
        *DECODER,
        attention_shape(),
        attention_and_mlp_bias(mlp_field="mlp_bias", output_field="attention_out_bias"),
        same("residual_dropout", "hidden_dropout", float),
    ),
    constants={name: value for name, value in CONSTANTS.items() if name != "hidden_dropout"},
    rows=llama_table,
)
