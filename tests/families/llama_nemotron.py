"""Llama-Nemotron (DeciLM): layers with other numbers of groups, other widths, without attention, without MLP."""

from typing import Any

from tests.rope_variants import rope

MODEL_TYPE = "nemotron-nas"


def block(heads_in_group: int | None, ffn_mult: float | None) -> dict[str, Any]:
    """A layer; None leaves attention or MLP out. 8 and 16 are widths of 256 and 512 at a hidden size of 48."""
    return {
        "attention": {
            "n_heads_in_group": heads_in_group,
            "no_op": heads_in_group is None,
            "replace_with_linear": False,
        },
        "ffn": {"ffn_mult": ffn_mult, "no_op": ffn_mult is None, "replace_with_linear": False},
    }


PLAIN = {"block_configs": [block(2, 8.0), block(None, 16.0), block(1, None), block(4, 8.0)]}
VARIANTS = {
    "llama_nemotron": PLAIN,
    "llama_nemotron_tied": {**PLAIN, "tie_word_embeddings": True},
    "llama_nemotron_all_bias": {**PLAIN, "attention_bias": True, "mlp_bias": True},
    "llama_nemotron_llama3": {**PLAIN, **rope("llama3")},
    "llama_nemotron_empty": {"block_configs": [block(None, None), block(2, 8.0), block(2, 8.0), block(None, None)]},
    "llama_nemotron_equal": {"block_configs": [block(2, 8.0)] * 4},
}
CHANGES = {"block_configs": [block(2, 8.0), block(2, 16.0), block(1, None), block(4, 8.0)]}
SHAPES = ["block_configs"]
REFUSED = {"num_key_value_heads": 2, "intermediate_size": 88}
SIZES = {"llama3_3_nemotron_super_49b": 49_867_145_216}
