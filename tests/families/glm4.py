"""GLM-4-0414."""

PLAIN = {"head_dim": 16}
HALF = {"rope_type": "default", "rope_theta": 1234.0, "partial_rotary_factor": 0.5}
VARIANTS = {
    "glm4": {**PLAIN, "rope_parameters": HALF},
    "glm4_no_bias_tied": {**PLAIN, "attention_bias": False, "tie_word_embeddings": True, "rope_parameters": HALF},
    "glm4_all_channels": {**PLAIN, "rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
}
CHANGES = {"attention_bias": False}
SIZES = {"glm4_9b": 9_400_279_040}
