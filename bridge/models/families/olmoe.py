"""OLMoE: Llama's shape with normalised queries and keys, over all heads together, and experts in every layer."""

from functools import partial

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.fields import attention_and_mlp_bias, attention_shape, only
from bridge.models.hf.moe import aux_loss, experts, softmax_weights
from bridge.models.hf.moe_rows import moe_table

FAMILY = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    hf_defaults={
        **HF_DEFAULTS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    parts=(
        *DECODER,
        attention_shape(has_head_dim=False),
        attention_and_mlp_bias(mlp_field=None),
        only("clip_qkv", None),  # a clamp of queries, keys and values
        experts("num_experts", "num_local_experts"),
        softmax_weights(),
        aux_loss(),
    ),
    constants={**CONSTANTS, "qk_layernorm_full_width": True, "moe_router_dtype": "fp32"},
    rows=moe_table,
    spellings={"fused_experts": partial(moe_table, fused_experts=True)},
)
