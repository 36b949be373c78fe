"""OLMoE."""

MOE = {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 3}
VARIANTS = {
    "olmoe": MOE,
    "olmoe_normed": {**MOE, "norm_topk_prob": True},
    "olmoe_tied_bias": {**MOE, "tie_word_embeddings": True, "attention_bias": True},
    "olmoe_mha": {**MOE, "num_key_value_heads": 4},
}
CHANGES = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.5,
    "output_router_logits": True,
}
SHAPES = ["num_experts"]
REFUSED = {"clip_qkv": 8.0}
SIZES = {"olmoe_1b_7b": 6_919_161_856}
