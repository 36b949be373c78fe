"""Which fields of a config transformers reads, told from its source: nothing that a model touches may be missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import ConversionError
from bridge.models import family
from bridge.models.hf import config as hf_config
from bridge.models.hf import reads as hf_reads
from tests import families, hf_models

PUBLISHED = [json.loads(line) for line in Path(__file__).with_name("published.jsonl").read_text().splitlines()]
LLAMA = next(entry["config"] for entry in PUBLISHED if entry["model"] == "meta-llama/Llama-2-7b-hf")


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry["model"])
def test_published_configs_go_through(entry: dict[str, Any]):
    """What is unread is told, kept for the export, and all there is to a refusal: without it the model is the same."""
    hf, unread = entry["config"], entry["unread"]
    section = hf_config.to_mcore(hf)
    assert section == hf_config.to_mcore({name: value for name, value in hf.items() if name not in unread})
    told = [line for line in hf_config.unread(hf) if "never reads" in line]
    assert told == ([f"config.json: transformers never reads {', '.join(unread)}: {KEPT}"] if unread else [])
    exported = hf_config.to_hf(section, dtype="bfloat16", source=hf)
    assert {name: exported[name] for name in unread} == {name: hf[name] for name in unread}


KEPT = "without effect here, kept for an export"


IN_TRANSFORMERS = [name for name in family.known_names() if name != "llama_nemotron"]


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_what_transformers_touches_is_counted_as_read(name: str, monkeypatch: pytest.MonkeyPatch):
    """All attributes of a config that are asked for while its model is built and run, against what the source told."""
    from transformers import PreTrainedConfig

    from tests.auto import AutoModelForCausalLM

    config = hf_models.config(next(iter(families.facts(name).VARIANTS)))
    touched: set[str] = set()
    plain = PreTrainedConfig.__getattribute__

    def noted(self: Any, attribute: str) -> Any:
        touched.add(attribute)
        return plain(self, attribute)

    monkeypatch.setattr(PreTrainedConfig, "__getattribute__", noted)
    with torch.no_grad():
        AutoModelForCausalLM.from_config(config)(hf_models.prompts(), use_cache=True)
    facts = family.by_name(name)
    reads = hf_reads.of_model_type(facts.class_of or facts.model_type)
    assert reads is not None and "num_hidden_layers" in touched
    missed = {attribute for attribute in touched if not attribute.startswith("__") and attribute not in reads}
    assert not missed


def test_a_field_that_is_as_if_absent_passes():
    reads = hf_reads.of_model_type("llama")
    assert reads is not None
    assert {"sliding_window", "per_layer_config", "is_encoder_decoder", "mlp_bias"} <= reads.names
    assert not reads.has_effect("sliding_window", None) and reads.has_effect("sliding_window", 7)
    assert not reads.has_effect("mlp_bias", False) and reads.has_effect("mlp_bias", 0)
    assert hf_config.to_mcore({**LLAMA, "sliding_window": None, "is_encoder_decoder": False}) == hf_config.to_mcore(
        LLAMA
    )


def test_what_other_programs_may_read_is_told():
    code = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M", "AutoTokenizer": ["tok.T", None]}
    _, own, vllm = hf_config.unread({**LLAMA, "logit_scale": 0.5, "auto_map": code})
    assert own == "config.json: auto_map: modeling_x.py, never run here, may read them"
    assert vllm == "config.json: vLLM reads logit_scale: its logits may differ from those of transformers"
    assert len(hf_config.unread({**LLAMA, "logit_scale": 1.0})) == 1


def test_without_the_source_of_transformers_an_unknown_field_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf_reads, "_root", lambda: None)
    hf_reads.of_model_type.cache_clear()
    hf_reads.of_every_model.cache_clear()
    try:
        with pytest.raises(ConversionError, match='config.json: a: 1, b: "x": LlamaForCausalLM.s own code may read'):
            hf_config.to_mcore({**LLAMA, "a": 1, "b": "x"})
    finally:
        hf_reads.of_model_type.cache_clear()
        hf_reads.of_every_model.cache_clear()
