"""GLM-4-0414 (9B, 32B), dense: norms on both sides of each branch, half of each head rotated, in neighbouring pairs."""

from bridge.models.families.llama import CONSTANTS, HF_DEFAULTS, SHAPE_AND_TRAINING
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, mlp, norms, output_norms
from bridge.models.hf.fields import activation, attention_shape, same
from bridge.models.hf.rope import rope
from bridge.weights.table import Table


def rows(model: Model) -> Table:
    """Gate and up are one tensor in the files, in megatron-core's order."""
    behind = output_norms(model, attention="post_self_attn_layernorm", mlp="post_mlp_layernorm")
    branches = [*attention(model), *mlp(model, fc1=("mlp.gate_up_proj",))]
    return Table([*embedding(model), *norms(model), *behind, *branches, *final(model)])


FAMILY = Family(
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    hf_defaults={
        **HF_DEFAULTS,
        "rms_norm_eps": 1.5625e-07,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": True,
    },
    parts=(
        *SHAPE_AND_TRAINING,
        activation(),
        rope(partial=0.5),
        attention_shape(),
        same("attention_bias", "add_qkv_bias", bool),
    ),
    constants={**CONSTANTS, "norm_placement": "sandwich", "add_bias_linear": False, "rotary_interleaved": True},
    rows=rows,
)
