"""Gemma 3, text."""

from typing import Any

from tests.rope_variants import ROPE

MODEL_TYPE = "gemma3_text"
LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]


def _rope(**full: Any) -> dict[str, Any]:
    return {
        "full_attention": {"rope_type": "default", "rope_theta": 1234.0, **full},
        "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
    }


PLAIN = {
    "head_dim": 16,
    "tie_word_embeddings": True,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "layer_types": LAYERS,
    "rope_parameters": _rope(rope_type="linear", factor=8.0),
}
VARIANTS = {
    "gemma3": PLAIN,
    "gemma3_untied": {**PLAIN, "tie_word_embeddings": False},
    "gemma3_attention_bias": {**PLAIN, "attention_bias": True, "rope_parameters": _rope()},
    "gemma3_capped": {**PLAIN, "final_logit_softcapping": 3.0},
    "gemma3_llama3": {**PLAIN, "rope_parameters": _rope(rope_type="llama3", **ROPE["llama3"])},
}
CHANGES = {
    "tie_word_embeddings": False,
    "hidden_activation": "silu",
    "query_pre_attn_scalar": 7,
    "final_logit_softcapping": 1.0,
    "rope_parameters": {**_rope(rope_theta=77.0), "sliding_attention": {"rope_type": "default", "rope_theta": 9.0}},
}
REFUSED = {"use_bidirectional_attention": True, "attn_logit_softcapping": 5.0}
SIZES = {"gemma3_1b": 999_885_952}


def HUB(hf: dict[str, Any]) -> dict[str, Any]:
    """The same config as files on the hub have it: a pattern instead of layer_types, rotary fields side by side."""
    nested = {kind: dict(parameters) for kind, parameters in hf["rope_parameters"].items()}
    full, local = nested["full_attention"], nested["sliding_attention"]
    old = {name: value for name, value in hf.items() if name not in ("rope_parameters", "dtype", "layer_types")}
    old |= {"sliding_window_pattern": hf["layer_types"].index("full_attention") + 1, "torch_dtype": hf.get("dtype")}
    old |= {"rope_theta": full.pop("rope_theta"), "rope_local_base_freq": local["rope_theta"]}
    return old | {"rope_scaling": None if full["rope_type"] == "default" else full}
