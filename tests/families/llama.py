"""Llama, and every kind of rotary scaling."""

from tests.rope_variants import ROPE, rope

VARIANTS = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "llama_mha": {"num_key_value_heads": 4},
    "llama_mqa": {"num_key_value_heads": 1},
    "llama_attention_bias": {"attention_bias": True},
    "llama_mlp_bias": {"mlp_bias": True},
    "llama_all_bias": {"attention_bias": True, "mlp_bias": True},
    "llama_head_dim": {"head_dim": 16},
    "llama_gelu": {"hidden_act": "gelu"},
    **{f"llama_{name}": rope(name) for name in ROPE},
}
SIZES = {
    "llama2_7b": 6_738_415_616,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
}
