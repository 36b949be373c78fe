"""Mistral."""

VARIANTS = {
    "mistral": {"sliding_window": 5},
    "mistral_full": {"sliding_window": None},
    "mistral_head_dim": {"sliding_window": None, "head_dim": 16},
}
SIZES = {"mistral_7b": 7_248_023_552}
