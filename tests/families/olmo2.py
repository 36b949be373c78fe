"""OLMo 2."""

VARIANTS = {
    "olmo2": {},
    "olmo2_tied_bias": {"tie_word_embeddings": True, "attention_bias": True},
    "olmo2_mha": {"num_key_value_heads": 4},
}
SIZES = {"olmo2_7b": 7_298_617_344}
