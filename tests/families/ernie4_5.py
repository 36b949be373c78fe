"""ERNIE 4.5, dense."""

from tests.rope_variants import rope

PLAIN = {"head_dim": 16}
VARIANTS = {
    "ernie4_5": PLAIN,
    "ernie4_5_tied": {**PLAIN, "tie_word_embeddings": True},
    "ernie4_5_bias": {**PLAIN, "use_bias": True},
    "ernie4_5_yarn": {**PLAIN, **rope("yarn")},
}
CHANGES = {"use_bias": True}
SHAPES = ["use_bias"]
SIZES = {"ernie4_5_0_3b": 360_748_032}
