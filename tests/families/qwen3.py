"""Qwen3, dense."""

from tests.families.qwen2 import ON, WINDOW

__all__ = ["ON", "SIZES", "VARIANTS"]

VARIANTS = {
    "qwen3": {"head_dim": 16},
    "qwen3_tied": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_attention_bias": {"head_dim": 16, "attention_bias": True},
    "qwen3_window": {"head_dim": 16, **WINDOW},
}
SIZES = {
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
}
