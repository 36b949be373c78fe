"""The shipped model files: each is a model of the size its publisher states, and its Hugging Face config agrees."""

from pathlib import Path

import pytest
import torch
import yaml

from bridge import parallel
from bridge.config.routing import route
from bridge.models import gpt, hf_config

CONF = Path(__file__).parents[2] / "conf" / "model"
# Parameters, from the model cards and the index files of the published checkpoints.
SIZES = {
    "llama2_7b": 6_738_415_616,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
}


def test_every_model_file_has_a_size_here():
    assert {path.stem for path in CONF.glob("*.yaml")} == SIZES.keys() | {"tiny"}


@pytest.mark.parametrize("name", [*SIZES, "tiny"])
def test_parameters_and_config(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    section = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    with parallel.single_process():
        (model,) = gpt.build(route({"model": section}), meta=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == SIZES.get(name, count)
    assert all(parameter.is_meta for parameter in model.parameters())
    exported = hf_config.to_hf(section, dtype="bfloat16")
    assert hf_config.to_mcore(exported) == section
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**exported))
    assert sum(parameter.numel() for parameter in hf.parameters()) == count
