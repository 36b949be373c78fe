"""Phi-3. A LongRoPE's trained length is a field of the config, and what rope_parameters says of it does not count."""

from typing import Any

from tests.rope_variants import ROPE


def longrope(**fields: Any) -> dict[str, Any]:
    parameters = {"rope_type": "longrope", "rope_theta": 1234.0, **ROPE["longrope"], **fields}
    del parameters["factor"]
    return {"rope_parameters": parameters, "original_max_position_embeddings": 16}


VARIANTS = {
    "phi3": {},
    "phi3_tied": {"tie_word_embeddings": True},
    "phi3_mha": {"num_key_value_heads": 4},
    "phi3_window": {"sliding_window": 5},
    "phi3_longrope": longrope(),
    "phi3_longrope_factor": longrope(attention_factor=1.3),
    "phi3_partial": {  # as Phi-4-mini: 6 of 8 channels, 3 pairs
        "partial_rotary_factor": 0.75,
        "num_attention_heads": 6,
        **longrope(short_factor=[1.0, 1.2, 1.5], long_factor=[1.0, 3.0, 6.0]),
    },
}
CHANGES = {
    "rope_parameters": longrope(long_factor=[2.0] * 6)["rope_parameters"],
    "original_max_position_embeddings": 20,
}
ON = longrope()
REFUSED = {
    "resid_pdrop": 0.2,
    "embd_pdrop": 0.2,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
SIZES = {"phi3_mini_4k": 3_821_079_552, "phi4_mini": 3_836_021_760, "phi4": 14_659_507_200}
