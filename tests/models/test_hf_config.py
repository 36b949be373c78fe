"""Hugging Face configs as they are found, the errors for what is not understood, and exports of changed models."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ConfigError, ConversionError
from bridge.models import family
from bridge.models.hf import config as hf_config
from bridge.models.hf import sizes as hf_sizes

# The published config.json of Llama-3.2-1B.
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_a_file_from_the_hub_is_the_shipped_model():
    import yaml

    conf = Path(__file__).parents[2] / "conf" / "model" / "llama3_2_1b.yaml"
    assert hf_config.to_mcore(LLAMA_3_2_1B) == yaml.safe_load(conf.read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 7}, "sliding_window: 7: transformers reads for a llama and that is not understood here"),
        ({"sliding_window": 7, "x": 1, "per_layer_config": {"0": {"mlp_bias": True}}}, "sliding_window: 7, per_layer"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "mish"}, "hidden_act: mish cannot be converted; known are silu"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures.*only LlamaForCausalLM is"),
        ({"model_type": "lama"}, "model_type: lama is not supported.*did you mean 'llama'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_parameters.rope_type: su"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "rope_parameters.beta"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "not one per full_attention"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: true"),
    ],
)
def test_a_field_that_is_not_understood_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ConversionError, match=message):
        hf_config.to_mcore({**LLAMA_3_2_1B, **changes})


@pytest.mark.parametrize("name", sorted(hf_config.REQUIRED & LLAMA_3_2_1B.keys()))
def test_a_missing_size_is_named(name: str):
    with pytest.raises(ConversionError, match=f"config.json: {name}: missing"):
        hf_config.to_mcore({key: value for key, value in LLAMA_3_2_1B.items() if key != name})


def test_sliding_layers_without_a_window_are_refused():
    qwen = {**LLAMA_3_2_1B, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2}
    qwen = {name: value for name, value in qwen.items() if name not in ("attention_bias", "mlp_bias")}
    assert "window_size" not in hf_config.to_mcore({**qwen, "sliding_window": 8})
    with pytest.raises(ConversionError, match="layer_types.*use_sliding_window"):
        hf_config.to_mcore({**qwen, "layer_types": ["sliding_attention", "full_attention"]})
    with pytest.raises(ConversionError, match="layer_types.*it needs 2 of"):
        hf_config.to_mcore({**qwen, "layer_types": ["chunked_attention", "full_attention"]})


def test_trained_length_at_the_top_level_wins_as_in_transformers():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    section = hf_config.to_mcore({**LLAMA_3_2_1B, "rope_scaling": yarn, "original_max_position_embeddings": 200})
    assert section["rope_parameters"]["original_max_position_embeddings"] == 200


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(ConversionError, match="config.json: not found"):
        hf_config.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="config.json: cannot be read"):
        hf_config.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConversionError, match="holds list"):
        hf_config.read(tmp_path)


def test_an_export_keeps_the_source_except_what_changed():
    section = hf_config.to_mcore(LLAMA_3_2_1B)
    assert hf_config.to_hf(section, dtype="bfloat16", source=LLAMA_3_2_1B) == LLAMA_3_2_1B
    longer = {"rope_type": "linear", "factor": 2.0}
    changed = {**section, "vocab_size": 128300, "rope_parameters": longer, "recompute_granularity": "full"}
    expected = {**LLAMA_3_2_1B, "vocab_size": 128300, "rope_scaling": longer, "torch_dtype": "float32"}
    assert hf_config.to_hf(changed, dtype="float32", source=LLAMA_3_2_1B) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "model.normalization: LayerNorm, but every LlamaForCausalLM has RMSNorm"),
        ({"qk_layernorm": True}, "model.qk_layernorm: true cannot be expressed"),
        ({"window_size": [7, 0]}, "model.window_size: \\[7, 0\\] cannot be expressed"),
        ({"num_moe_experts": 4}, "model.num_moe_experts"),
        ({"add_qkv_bias": True}, "model.add_qkv_bias: true"),
        ({"position_embedding_type": "none"}, "model.position_embedding_type"),
        ({"rotary_percent": 0.5}, "model.rotary_percent"),
    ],
)
def test_a_model_the_hugging_face_class_cannot_be_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConversionError, match=message):
        hf_config.to_hf({**hf_config.to_mcore(LLAMA_3_2_1B), **changes}, dtype="float32")


def test_a_family_outside_this_package(monkeypatch: pytest.MonkeyPatch):
    module: Any = types.ModuleType("outside.family")
    module.FAMILY = family.by_name("llama")
    monkeypatch.setitem(sys.modules, "outside", types.ModuleType("outside"))
    monkeypatch.setitem(sys.modules, "outside.family", module)
    section = hf_config.to_mcore({**LLAMA_3_2_1B, "model_type": "mine"}, family="outside.family")
    assert section["family"] == "outside.family"
    assert hf_config.to_hf(section, dtype="float32")["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(ConfigError, match="model.family: lama is not one of.*did you mean 'llama'"):
        family.by_name("lama")
    with pytest.raises(ConfigError, match="model.family: 'outside.none' cannot be imported"):
        family.by_name("outside.none")


NO_SIZES = [10**12, 0, -4, 64.0, "64", True, None, float("nan"), [64]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in sorted(hf_sizes.SIZES.keys() & LLAMA_3_2_1B.keys())
        for value in NO_SIZES
        if value is not None or name not in ("num_key_value_heads", "head_dim")
    ],
)
def test_what_is_no_size_is_refused_before_anything_is_counted_by_it(name: str, value: Any):
    with pytest.raises(ConversionError, match=rf"^(config.json: )?{name}: ") as refusal:
        hf_config.to_mcore({**LLAMA_3_2_1B, name: value})
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: NaN: not a finite number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: small cannot be converted; it has to be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false' .*true or false"),
        ({"rope_theta": "many"}, 'rope_theta: "many".*cannot be read'),
        ({"rope_scaling": [1]}, r"rope_scaling: \[1\].*cannot be read"),
        ({"hidden_size": 10**12, "vocab_size": -1}, "hidden_size: 1000000000000 .*, vocab_size: -1 "),
    ],
)
def test_a_value_of_another_kind_is_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(ConversionError, match=message) as refusal:
        hf_config.to_mcore({**LLAMA_3_2_1B, **changes})
    assert "\n" not in str(refusal.value)


def test_more_layers_or_experts_than_files_can_hold():
    shapes = [(64, 8), (8,)]
    hf_sizes.check_stored({"num_layers": 2, "num_moe_experts": 64}, shapes, source="dir")
    with pytest.raises(ConversionError, match="config.json: 3 layers, but dir holds 2 tensors"):
        hf_sizes.check_stored({"num_layers": 3}, shapes, source="dir")
    with pytest.raises(ConversionError, match="config.json: 65 experts, but dir holds 2 tensors"):
        hf_sizes.check_stored({"num_layers": 1, "num_moe_experts": 65}, shapes, source="dir")
