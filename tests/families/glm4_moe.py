"""GLM-4.5, GLM-4.5-Air and GLM-4.6."""

from typing import Any

from tests.rope_variants import rope

HALF = {"rope_type": "default", "rope_theta": 1234.0, "partial_rotary_factor": 0.5}
MOE: dict[str, Any] = {
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "n_group": 4,
    "topk_group": 2,
    "attention_bias": True,
    "use_qk_norm": True,
    "rope_parameters": HALF,
}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
YARN = rope("yarn")["rope_parameters"] | {"partial_rotary_factor": 0.5}

VARIANTS = {
    "glm4_moe": MOE,  # with one prediction module, which transformers' class defaults to
    "glm4_moe_air": {**MOE, **ONE_GROUP, "use_qk_norm": False, "routed_scaling_factor": 1.0},
    "glm4_moe_two_predictions": {**MOE, **ONE_GROUP, "num_nextn_predict_layers": 2, "norm_topk_prob": False},
    "glm4_moe_tied": {**MOE, "tie_word_embeddings": True, "attention_bias": False, "first_k_dense_replace": 0},
    "glm4_moe_without_predictions": {**MOE, "num_nextn_predict_layers": 0, "n_shared_experts": 1},
    "glm4_moe_yarn": {**MOE, "rope_parameters": YARN},
    "glm4_moe_dense": {**MOE, "first_k_dense_replace": 4, "num_nextn_predict_layers": 0},
}
CHANGES = {
    "rope_parameters": {**YARN, "partial_rotary_factor": 0.25},
    "attention_bias": False,
    "use_qk_norm": False,
    "moe_intermediate_size": 40,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 0.6,
    "norm_topk_prob": False,
    "n_group": 2,
    "topk_group": 3,
    "output_router_logits": True,
    "num_mtp_layers": 2,
}
SHAPES = {"use_qk_norm", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "first_k_dense_replace"}
# Less than published: files repeat embedding and output layer in the prediction module; correction biases are buffers.
SIZES = {"glm4_5_air": 109_227_304_960, "glm4_5": 356_785_884_416}
