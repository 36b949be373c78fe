"""SmolLM3."""

from tests.rope_variants import rope

PLAIN = {"num_key_value_heads": 2, "tie_word_embeddings": True, "no_rope_layer_interval": 3}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
VARIANTS = {
    "smollm3": PLAIN,
    "smollm3_untied": {**PLAIN, "tie_word_embeddings": False},
    "smollm3_window": {**PLAIN, **WINDOW},
    "smollm3_listed": {
        **WINDOW,
        "no_rope_layers": [0, 1, 1, 0],
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3_every_other": {**PLAIN, "no_rope_layer_interval": 2},
    "smollm3_rope_everywhere": {**PLAIN, "no_rope_layers": [1, 1, 1, 1]},
    "smollm3_all_bias": {**PLAIN, "attention_bias": True, "mlp_bias": True},
    "smollm3_yarn": {**PLAIN, **rope("yarn")},
}
CHANGES = {"no_rope_layers": [1, 0, 0, 1], "no_rope_layer_interval": 2, "tie_word_embeddings": False}
ON = {**WINDOW, "layer_types": None}
UNREAD = ["no_rope_layer_interval"]  # no_rope_layers says it all
SIZES = {"smollm3_3b": 3_075_098_624}
