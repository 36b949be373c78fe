"""Qwen3 with experts (30B-A3B, 235B-A22B): Qwen3's attention, softmax routing, dense layers only where asked for."""

from functools import partial

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.fields import attention_and_mlp_bias, attention_shape, same, window_everywhere
from bridge.models.hf.moe import aux_loss, experts, layers_by_step, softmax_weights
from bridge.models.hf.moe_rows import moe_table

MOE_DEFAULTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}

FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    hf_defaults={
        **HF_DEFAULTS,
        **MOE_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    parts=(
        *DECODER,
        attention_shape(),
        attention_and_mlp_bias(mlp_field=None),
        window_everywhere(switch="use_sliding_window", unread="max_window_layers"),
        experts("num_experts", "num_local_experts"),
        same("moe_intermediate_size", "moe_ffn_hidden_size"),
        layers_by_step(),
        softmax_weights(),
        aux_loss(),
    ),
    constants={**CONSTANTS, "qk_layernorm": True, "moe_router_dtype": "fp32"},
    rows=moe_table,
    spellings={"fused_experts": partial(moe_table, fused_experts=True)},
)
