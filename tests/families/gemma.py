"""Gemma."""

from tests.rope_variants import rope

PLAIN = {"head_dim": 16, "tie_word_embeddings": True}
VARIANTS = {
    "gemma": PLAIN,
    "gemma_untied": {**PLAIN, "tie_word_embeddings": False},
    "gemma_attention_bias": {**PLAIN, "attention_bias": True},
    "gemma_wide_heads": {**PLAIN, "head_dim": 20, "num_key_value_heads": 4},
    "gemma_linear": {**PLAIN, **rope("linear")},
}
CHANGES = {"tie_word_embeddings": False, "hidden_act": "relu"}
REFUSED = {"use_bidirectional_attention": True}
SIZES = {"gemma_2b": 2_506_172_416, "gemma_7b": 8_537_680_896}
