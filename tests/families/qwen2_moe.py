"""Qwen1.5-MoE and Qwen2-57B-A14B."""

from tests.rope_variants import rope

MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
MIXED = {**MOE, "mlp_only_layers": [1]}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
VARIANTS = {
    "qwen2_moe": MIXED,
    "qwen2_moe_no_dense": MOE,
    "qwen2_moe_normed": {**MOE, "norm_topk_prob": True},
    "qwen2_moe_every_second": {**MOE, "decoder_sparse_step": 2},
    "qwen2_moe_tied_no_bias": {**MOE, "tie_word_embeddings": True, "qkv_bias": False},
    "qwen2_moe_window": {**MIXED, **WINDOW},
    "qwen2_moe_window_everywhere": {**MOE, **WINDOW, "layer_types": ["sliding_attention"] * 4},
    "qwen2_moe_yarn": {**MIXED, **rope("yarn")},
}
CHANGES = {
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.5,
    "output_router_logits": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0, 2],
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "qkv_bias": False,
}
SHAPES = {"decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "shared_expert_intermediate_size"} | {
    "num_experts",
    "qkv_bias",
}
ON = {**WINDOW, "layer_types": None}
UNREAD = ["max_window_layers"]  # layer_types says it all
SIZES = {"qwen1_5_moe_a2_7b": 14_315_784_192}
