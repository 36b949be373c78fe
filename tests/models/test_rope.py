"""Frequencies and attention factors against transformers' own functions, over options the tiny models do not have."""

import math

import pytest
import torch

from bridge.errors import ConfigError, ConversionError
from bridge.models.hf import rope as hf_rope
from bridge.models.modules import rope

LONG = {"long_factor": [1.0 + i / 3 for i in range(32)], "short_factor": [1.0 + i / 50 for i in range(32)]}
CASES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 512,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.9},
    {"rope_type": "longrope", "original_max_position_embeddings": 256, **LONG},
    {"rope_type": "longrope", "original_max_position_embeddings": 256, "factor": 3.0, **LONG},
    {"rope_type": "longrope", "original_max_position_embeddings": 256, "attention_factor": 1.1, **LONG},
]


@pytest.mark.parametrize("seq_len", [100, 4096, 10000])
@pytest.mark.parametrize("parameters", CASES, ids=lambda case: case["rope_type"])
def test_equals_transformers(parameters: dict, seq_len: int):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 50000.0, **parameters},
    )
    kind = parameters["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    inv_freq, factor = compute(config, device=torch.device("cpu"), seq_len=seq_len)
    ours = rope.inverse_frequencies(
        parameters, rotary_base=50000, dim=64, seq_len=seq_len, max_sequence_length=config.max_position_embeddings
    )
    torch.testing.assert_close(ours.inv_freq, inv_freq, rtol=2e-6, atol=0)
    assert math.isclose(ours.attention_factor, factor, rel_tol=1e-6)
    assert rope.attention_factor(parameters, max_sequence_length=4096) == ours.attention_factor


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "yarm", "factor": 2.0}, "model.rope_parameters.rope_type: yarm .*did you mean 'yarn'"),
        ({"rope_type": "linear"}, "model.rope_parameters.factor: missing; rope_type linear needs it"),
        ({"rope_type": "linear", "factor": 2.0, "truncat": True}, "model.rope_parameters.truncat"),
        ({"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}, "need 32 numbers each"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        rope.inverse_frequencies(parameters, rotary_base=10000, dim=64, seq_len=8, max_sequence_length=64)


def shape(**fields) -> dict:
    return {"hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64, **fields}


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, 0.5),
        ({"partial_rotary_factor": 0.25}, 0.25),
        ({"rope_parameters": {"partial_rotary_factor": 0.75}, "partial_rotary_factor": 0.25}, 0.75),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}}, 0.25),
    ],
)
def test_share_of_rotated_channels(fields: dict, share: float):
    part = hf_rope.rope(partial=0.5)
    section = part.read(shape(**fields))
    assert section["rotary_percent"] == share
    written = part.write({"rope_parameters": None, **section})
    assert written["partial_rotary_factor"] == share
    assert part.read(shape(**written)) == section


@pytest.mark.parametrize("share", [0.0, 0.3, 1.5])  # of 24 channels: none, 7, 36
def test_a_share_that_leaves_no_pairs_is_refused(share: float):
    with pytest.raises(ConversionError, match=f"partial_rotary_factor: {share} .* an even number of the 24 channels"):
        hf_rope.rope(partial=0.5).read(shape(partial_rotary_factor=share))
