"""Gemma 2. The scores and logits of tiny models go far beyond these caps."""

from tests.rope_variants import rope

PLAIN = {
    "head_dim": 16,
    "tie_word_embeddings": True,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 3.0,
}
VARIANTS = {
    "gemma2": PLAIN,
    "gemma2_untied": {**PLAIN, "tie_word_embeddings": False},
    "gemma2_uncapped": {**PLAIN, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2_attention_bias": {**PLAIN, "attention_bias": True, "query_pre_attn_scalar": 16},
    "gemma2_linear": {**PLAIN, **rope("linear")},
}
CHANGES = {
    "tie_word_embeddings": False,
    "hidden_activation": "silu",
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 1.0,
}
REFUSED = {"use_bidirectional_attention": True}
SIZES = {"gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984}
