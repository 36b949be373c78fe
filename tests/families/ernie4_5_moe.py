"""ERNIE 4.5 with experts."""

from tests.rope_variants import rope

MOE = {"moe_intermediate_size": 24, "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2, "moe_norm_min": 0.4}
VARIANTS = {
    "ernie4_5_moe": MOE,
    "ernie4_5_moe_no_least_sum": {**MOE, "moe_norm_min": 1e-12, "moe_num_shared_experts": 0},
    "ernie4_5_moe_tied_one_expert_per_token": {**MOE, "tie_word_embeddings": True, "moe_k": 1},
    "ernie4_5_moe_every_second": {**MOE, "moe_layer_interval": 2},
    "ernie4_5_moe_in_the_middle": {**MOE, "moe_layer_end_index": 2},
    "ernie4_5_moe_everywhere": {**MOE, "moe_layer_start_index": 0},
    "ernie4_5_moe_dense": {**MOE, "moe_layer_start_index": 4},
    "ernie4_5_moe_yarn": {**MOE, **rope("yarn")},
}
CHANGES = {
    "moe_intermediate_size": 40,
    "moe_k": 4,
    "moe_num_experts": 16,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 2,
    "moe_layer_end_index": 2,
    "moe_layer_interval": 2,
    "moe_norm_min": 0.7,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
SHAPES = """moe_intermediate_size moe_num_experts moe_num_shared_experts moe_layer_start_index moe_layer_end_index
moe_layer_interval""".split()  # noqa: SIM905
REFUSED = {"use_bias": True}
SIZES = {"ernie4_5_21b_a3b": 21_825_436_160}
