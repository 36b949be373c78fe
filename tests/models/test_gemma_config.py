"""Gemma's configs as they are found, and what of them is refused: each class of transformers reads them differently."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.errors import ConversionError
from bridge.models.hf import config as hf_config

CONF = Path(__file__).parents[2] / "conf" / "model"
# The published config.json of gemma-3-1b-it, without fields of generation and training.
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
GEMMA = {"model_type": "gemma", **SHAPE}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def test_published_gemma_3():
    section = hf_config.to_mcore(GEMMA3)
    assert section == yaml.safe_load((CONF / "gemma3_1b.yaml").read_text())
    absent = {"rope_local_base_freq", "rope_theta", "sliding_window_pattern", "query_pre_attn_scalar"}
    defaults = {name: value for name, value in GEMMA3.items() if name not in absent}
    assert hf_config.to_mcore(defaults) == section


def test_scaling_is_for_the_layers_without_a_window():
    section = hf_config.to_mcore({**GEMMA3, "rope_scaling": LINEAR})
    assert (section["rope_parameters"], section["rope_local_base_freq"]) == (LINEAR, 10000)


def test_without_windows_there_is_one_rotary_embedding():
    plain = hf_config.to_mcore({**GEMMA3, "layer_types": ["full_attention"] * 26})
    assert not plain.keys() & {"window_size", "window_attn_skip_freq", "rope_local_base_freq"}
    assert hf_config.to_mcore(hf_config.to_hf(plain, dtype="float32")) == plain


def test_first_gemma_says_gelu_and_means_its_tanh_form():
    for act in ("gelu", "gelu_pytorch_tanh"):
        for more in ({}, {"hidden_activation": None}, {"hidden_activation": "gelu_pytorch_tanh"}):
            assert hf_config.to_mcore({**GEMMA, "hidden_act": act, **more})["activation_func"] == "gelu_tanh"


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({**GEMMA, "hidden_act": "gelu", "hidden_activation": "relu"}, "hidden_activation: relu .* make them equal"),
        ({**GEMMA3, "rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling: .* reads rope_type in it"),
        ({**GEMMA3, "rope_parameters": LINEAR}, "rope_parameters: .* parameters of full_ and sliding_attention each"),
        ({**GEMMA3, "rope_parameters": {"sliding_attention": LINEAR}}, "sliding_attention: .* needs rope_type default"),
        ({**GEMMA3, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: yarn .* only default, linear"),
        ({**GEMMA3, "layer_types": ["full_attention"]}, "layer_types: .* it needs 26 of"),
        ({**GEMMA3, "sliding_window": None}, "sliding_window: null .* whole number"),
    ],
)
def test_refused_configs(hf: dict[str, Any], message: str):
    with pytest.raises(ConversionError, match=message):
        hf_config.to_mcore(hf)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("gemma_2b", {"embedding_multiplier": 3.0}, "model.embedding_multiplier: 3.0 .* this family has 45.25"),
        ("gemma_2b", {"activation_func": "gelu"}, "model.activation_func: gelu .* gelu_tanh"),
        ("gemma2_2b", {"softmax_scale": 0.3}, "model.softmax_scale: 0.3 .* 1 / sqrt of a whole number"),
        ("gemma3_1b", {"rope_local_base_freq": None, "rope_parameters": LINEAR}, "model.rope_local_base_freq: null"),
    ],
)
def test_refused_exports(model: str, change: dict[str, Any], message: str):
    section = yaml.safe_load((CONF / f"{model}.yaml").read_text()) | change
    with pytest.raises(ConversionError, match=message):
        hf_config.to_hf(section, dtype="float32")
