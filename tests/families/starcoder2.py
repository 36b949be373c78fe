"""StarCoder2."""

# Published files have these, of the code that trained them; here with values that would change the logits.
EXTRA = {
    "activation_function": "relu",
    "attention_softmax_in_fp32": False,
    "layer_norm_epsilon": 0.5,
    "mlp_type": "gated",
    "norm_type": "rms_norm",
    "scale_attention_softmax_in_fp32": False,
    "scale_attn_weights": False,
}
BASE = {"norm_epsilon": 5e-3, "sliding_window": 5, "tie_word_embeddings": True, **EXTRA}
UNREAD = list(EXTRA)
VARIANTS = {
    "starcoder2": {},
    "starcoder2_untied": {"tie_word_embeddings": False},
    "starcoder2_no_bias": {"use_bias": False, "sliding_window": None},
    "starcoder2_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 999.44}},
}
CHANGES = {
    "norm_epsilon": 1e-1,
    "tie_word_embeddings": False,
    "use_bias": False,
}
SHAPES = ["use_bias"]
REFUSED = {"residual_dropout": 0.2, "embedding_dropout": 0.2}
SIZES = {"starcoder2_3b": 3_030_371_328, "starcoder2_7b": 7_173_923_840}
