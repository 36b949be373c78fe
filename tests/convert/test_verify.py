"""verify accepts what is the same model and names what is not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.config.schema import ConvertConfig
from bridge.convert import run
from bridge.convert.import_ import import_hf
from bridge.convert.verify import describe, verify
from bridge.errors import ConversionError
from bridge.sources import reference


@pytest.fixture
def pair(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    import_hf(source, tmp_path / "megatron")
    return source, tmp_path / "megatron"


def settings(pair, **options):
    return ConvertConfig(mode="verify", hf=str(pair[0]), megatron=str(pair[1]), **options)


def test_report_of_the_same_model(pair, capsys):
    assert run(settings(pair)) == 0
    report = json.loads((pair[1] / "verify.json").read_text())
    assert report["passed"]
    assert report["tensors"] == {"equal": 39, "total": 39, "cast": 0, "different": []}
    assert 0 < report["logits"]["max_abs_diff"] < 2e-5  # the noise floor of fp32 logits of this size
    assert report["logits"]["min_cosine"] > 0.999999
    assert report["logits"]["top1_agreement"] == 1
    assert report["logits"]["num_positions"] > 50
    printed = capsys.readouterr().out
    assert "tensors: 39/39 equal\n" in printed
    assert "\nverified\n" in printed


def test_one_changed_element_is_found(pair):
    stored = load_file(pair[0] / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(stored, pair[0] / "model.safetensors", metadata={"format": "pt"})
    report = verify(*pair)
    assert not report["passed"]
    assert report["tensors"]["different"] == ["model.layers.1.mlp.up_proj.weight"]
    assert report["logits"]["max_abs_diff"] > 1e-3
    assert "38/39 equal; different: model.layers.1.mlp.up_proj.weight" in describe(report)
    assert run(settings(pair)) == 1


def test_a_wrong_config_is_found_although_all_tensors_are_equal(pair):
    config = json.loads((pair[0] / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1000.0
    (pair[0] / "config.json").write_text(json.dumps(config))
    report = verify(*pair)
    assert report["tensors"]["equal"] == 39
    assert not report["passed"]


def test_cast_checkpoints_are_compared_after_the_cast(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    import_hf(source, tmp_path / "megatron", dtype=torch.bfloat16)
    report = verify(source, tmp_path / "megatron")
    assert (report["tensors"]["equal"], report["tensors"]["cast"]) == (39, 39)
    assert report["logits"]["max_abs_diff"] > 1e-4  # and the rounding shows in the logits
    assert verify(source, tmp_path / "megatron", tolerance=1.0)["passed"]


def test_own_prompts_tolerance_and_report_file(pair, tmp_path):
    options = {"prompts": ["a", "bb"], "tolerance": 0.0, "report": str(tmp_path / "report.json")}
    assert run(settings(pair, **options)) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["logits"]["num_positions"], report["tolerance"]) == (3, 0.0)


def test_without_a_tokenizer_prompts_are_token_ids(tiny_hf, tmp_path):
    source = tiny_hf("llama", tokenizer=False)
    import_hf(source, tmp_path / "megatron")
    assert verify(source, tmp_path / "megatron")["passed"]
    with pytest.raises(ConversionError, match="^prompts: .* has no tokenizer"):
        verify(source, tmp_path / "megatron", prompts=["a"])


def test_a_model_whose_code_is_not_in_transformers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {"AutoConfig": "a.B"}}')
    with pytest.raises(ConversionError, match="model_type unheard_of is not in transformers, so no logits"):
        reference.load(tmp_path)
