"""Mixtral."""

from tests.rope_variants import rope

PLAIN = {"head_dim": 16, "intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2}
VARIANTS = {
    "mixtral": PLAIN,
    "mixtral_window": {**PLAIN, "sliding_window": 5},
    "mixtral_tied_one_expert_per_token": {**PLAIN, "tie_word_embeddings": True, "num_experts_per_tok": 1},
    "mixtral_yarn": {**PLAIN, **rope("yarn")},
    "mixtral_jitter": {**PLAIN, "router_jitter_noise": 0.1},
}
CHANGES = {
    "num_local_experts": 4,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.2,
    "output_router_logits": True,
}
SHAPES = {"num_local_experts"}
SIZES = {"mixtral_8x7b": 46_702_792_704}
