"""Small models that between them have what a layout can break, and the layouts."""

from typing import Any

from tests.training.runs import MODEL

DENSE: dict[str, Any] = {
    **MODEL,
    "num_layers": 4,
    "share_embeddings_and_output_weights": True,
    "qk_layernorm": True,
    "window_size": [6, 0],
    "window_attn_skip_freq": [0, 1, 1, 0],
}
ONE_GROUP = {**DENSE, "num_query_groups": 1, "share_embeddings_and_output_weights": False}
EXPERTS: dict[str, Any] = {
    **MODEL,
    "family": "qwen3_moe",
    "num_layers": 4,
    "num_moe_experts": 4,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_topk": 2,
    "moe_router_dtype": "fp32",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
}
SIGMOID = {
    **EXPERTS,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
    "moe_router_load_balancing_type": "seq_aux_loss",
}
LATENT: dict[str, Any] = {
    **{name: value for name, value in SIGMOID.items() if name not in ("num_query_groups", "kv_channels")},
    "family": "deepseek_v3",
    "multi_latent_attention": True,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "mtp_num_layers": 1,
    "mtp_loss_scaling_factor": 0.1,
}
