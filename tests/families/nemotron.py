"""Nemotron. Half of a head's 12 channels are rotated, unless a variant says otherwise."""

from tests.rope_variants import rope

BASE = {"norm_eps": 5e-3}


def partial(name: str, share: float) -> dict:
    return {"rope_parameters": {**rope(name)["rope_parameters"], "partial_rotary_factor": share}}


VARIANTS = {
    "nemotron": {},
    "nemotron_tied": {"tie_word_embeddings": True},
    "nemotron_all_bias": {"attention_bias": True, "mlp_bias": True},
    "nemotron_attention_bias": {"attention_bias": True},
    "nemotron_head_dim": {"head_dim": 16},
    "nemotron_all_rotated": partial("linear", 1.0),
    # The kinds with an attention factor: rotated channels only have it.
    "nemotron_yarn": partial("yarn", 0.5),
    "nemotron_yarn_options": {"head_dim": 16, **partial("yarn_options", 0.75)},
    "nemotron_longrope": {"head_dim": 16, **partial("longrope", 0.75)},
}
CHANGES = {
    "norm_eps": 1e-1,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0, "partial_rotary_factor": 0.34},
    "head_dim": 24,
}
SIZES = {"nemotron_mini_4b": 4_190_509_056}
