"""GPT-2."""

BASE = {
    "n_embd": 48,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "layer_norm_epsilon": 5e-3,
    "tie_word_embeddings": True,
}
VARIANTS = {
    "gpt2": {},
    "gpt2_untied": {"tie_word_embeddings": False},
    "gpt2_inner": {"n_inner": 88},
    "gpt2_no_dropout": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt2_unscaled": {"scale_attn_weights": False},
}
CHANGES = {
    "n_positions": 128,
    "n_embd": 96,
    "n_layer": 3,
    "n_head": 8,
    "n_inner": 104,
    "activation_function": "relu",
    "attn_pdrop": 0.3,
    "layer_norm_epsilon": 1e-1,
    "scale_attn_weights": False,
    "tie_word_embeddings": False,
    "summary_type": "mean",
    "summary_use_proj": False,
    "summary_activation": "tanh",
    "summary_proj_to_labels": False,
    "summary_first_dropout": 0.3,
}
SHAPES = ["n_positions", "n_embd", "n_layer", "n_inner"]
REFUSED = {
    "resid_pdrop": 0.2,
    "embd_pdrop": 0.2,
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
    "add_cross_attention": True,
}
SIZES = {"gpt2": 124_439_808, "gpt2_xl": 1_557_611_200}
