"""Granite 3."""

PLAIN = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.7,
}
VARIANTS = {
    "granite": PLAIN,
    "granite_tied": {**PLAIN, "tie_word_embeddings": True},
    "granite_all_bias": {**PLAIN, "attention_bias": True, "mlp_bias": True},
    "granite_without_multipliers": {"attention_multiplier": 12**-0.5},
}
CHANGES = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.0,
}
SIZES = {"granite3_3_2b": 2_533_539_840, "granite3_3_8b": 8_170_864_640}
