"""Qwen3 with experts."""

MOE = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
MIXED = {**MOE, "mlp_only_layers": [1]}
VARIANTS = {
    "qwen3_moe": MIXED,
    "qwen3_moe_no_dense": MOE,
    "qwen3_moe_unnormed": {**MOE, "norm_topk_prob": False},
    "qwen3_moe_every_second": {**MOE, "decoder_sparse_step": 2},
    "qwen3_moe_one_with_experts": {**MOE, "mlp_only_layers": [0, 1, 3]},
    "qwen3_moe_tied_bias": {**MOE, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3_moe_window": {**MOE, "use_sliding_window": True, "sliding_window": 5},
}
CHANGES = {
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.5,
    "output_router_logits": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0, 2],
    "moe_intermediate_size": 24,
    "num_experts": 4,  # not read where num_local_experts is there, which transformers 5 writes
}
SHAPES = {"decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size"}
ON = {"use_sliding_window": True, "sliding_window": 5}
SIZES = {"qwen3_30b_a3b": 30_532_122_624, "qwen3_235b_a22b": 235_093_634_560}
