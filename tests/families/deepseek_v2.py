"""DeepSeek-V2 and V2-Lite."""

from typing import Any

# Latent attention of BASE's width. The first layer is dense; experts make up for few tokens with a small choice.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
# max_position_embeddings of BASE is 64, so that prompts reach beyond the trained length.
YARN = {"rope_type": "yarn", "rope_theta": 1234.0, "factor": 4.0, "original_max_position_embeddings": 16}
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 20.0, "beta_slow": 2.0}
GREEDY = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
LIMITED = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}

VARIANTS = {
    "deepseek_v2": {**LATENT, **LIMITED},
    "deepseek_v2_lite": {**LATENT, **GREEDY, "q_lora_rank": None, "rope_parameters": MSCALE},
    "deepseek_v2_yarn": {**LATENT, **LIMITED, "rope_parameters": YARN},
    "deepseek_v2_dense": {**LATENT, **GREEDY, "first_k_dense_replace": 4, "tie_word_embeddings": True},
    "deepseek_v2_experts": {**LATENT, **LIMITED, "first_k_dense_replace": 0},
}
LATENT_CHANGES = {
    "q_lora_rank": 28,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 12,
    "v_head_dim": 20,
    "moe_intermediate_size": 40,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 0.6,
    "output_router_logits": True,
    "topk_group": 3,
    "n_group": 2,
    "rope_parameters": MSCALE,
}
CHANGES = {**LATENT_CHANGES, "topk_method": "greedy"}
SHAPES = """q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim moe_intermediate_size n_routed_experts
n_shared_experts first_k_dense_replace""".split()  # noqa: SIM905
LATENT_REFUSED = {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True}
REFUSED = {**LATENT_REFUSED, "mlp_bias": True, "norm_topk_prob": True, "topk_method": "noaux_tc"}
SIZES = {"deepseek_v2_lite": 15_706_484_224, "deepseek_v2": 235_741_434_880}
