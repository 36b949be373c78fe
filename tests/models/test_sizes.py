"""The shipped model files: each is a model of the size its publisher states, and its Hugging Face config agrees."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer.moe import experts

from bridge import parallel
from bridge.config.routing import route
from bridge.models import family, gpt
from bridge.models.hf import config as hf_config
from tests import families

CONF = Path(__file__).parents[2] / "conf" / "model"
SIZES: dict[str, int] = {}
for name in families.names():
    SIZES |= families.get(name, "SIZES")


def test_every_model_file_has_a_size_here():
    assert {path.stem for path in CONF.glob("*.yaml")} == SIZES.keys() | {"tiny"}


class OneExpert:
    """In place of the class of an expert: all experts of a layer are one module, since they are equal without storage.

    A layer of 128 experts takes 0.1 s to build, and qwen3_235b_a22b has 94 of them.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.config: Any = None  # of the layer: megatron-core's SequentialMLP makes all its experts with one
        self.expert: Any = None

    def __call__(self, config: Any, *others: Any, **named: Any) -> Any:
        if self.config is not config:
            self.config, self.expert = config, self.kind(config, *others, **named)
        return self.expert


@pytest.mark.parametrize("name", [*SIZES, "tiny"])
def test_parameters_and_config(name: str, monkeypatch: pytest.MonkeyPatch):
    from tests.auto import AutoConfig, AutoModelForCausalLM

    section = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    monkeypatch.setattr(experts, "MLP", OneExpert(experts.MLP))
    with parallel.single_process():
        (model,) = gpt.build(route({"model": section}), meta=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    count = sum(parameter.numel() for parameter in parameters.values())
    assert count == SIZES.get(name, count)
    assert all(parameter.is_meta for parameter in parameters.values())
    exported = hf_config.to_hf(section, dtype="bfloat16")
    assert hf_config.to_mcore(exported) == section
    exported["model_type"] = family.by_name(section["family"]).class_of or exported["model_type"]
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**exported))
    predictions = sum(parameter.numel() for name, parameter in parameters.items() if name.startswith("mtp."))
    # transformers builds no such modules, and has a parameter without gradient where megatron-core has a buffer.
    assert sum(parameter.numel() for parameter in hf.parameters() if parameter.requires_grad) == count - predictions
