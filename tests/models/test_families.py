"""The contract every family keeps: the logits of transformers, and a config that means the same after a round trip."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge import parallel, platform
from bridge.config.routing import route
from bridge.errors import ConversionError
from bridge.models import family, gpt
from bridge.models.hf import config as hf_config
from bridge.weights import into_model, shards
from bridge.weights.hf_files import open_hf
from tests import families, hf_models

TOLERANCE = 1e-4  # fp32 noise of tiny models against fp64 is at most 2e-5


def mcore_logits(
    directory: Path, ids: torch.Tensor, *, dtype: torch.dtype = torch.float32, **fields: Any
) -> torch.Tensor:
    """Logits of our model with the weights in an HF directory, [batch, length, vocab]; `fields` join its section."""
    section = hf_config.to_mcore(hf_config.read(directory))
    with parallel.single_process():
        return logits_of_section(section, directory, ids, dtype=dtype, **fields)


def logits_of_section(
    section: dict[str, Any], directory: Path, ids: torch.Tensor, *, dtype: torch.dtype = torch.float32, **fields: Any
) -> torch.Tensor:
    """The same of a model section, in process groups that exist. Of `directory` only the weights are read."""
    routed = route({"model": {**section, "make_vocab_size_divisible_by": 16, **fields}})
    (model,) = gpt.build(routed, dtype=dtype)
    table = family.by_name(routed.family).table(section)
    into_model.load_hf([model], open_hf(directory), table=table, vocab_size=section["vocab_size"])
    model.eval()
    ids = ids.to(platform.device())
    with torch.no_grad():
        return model(ids, torch.arange(ids.size(1)).to(ids).expand_as(ids), None)[..., : model.true_vocab_size].cpu()


WITH_EXPERTS = [
    name for name in family.known_names() if any("experts" in field for field in family.by_name(name).hf_defaults)
]


def prompts(variant: str) -> torch.Tensor:
    """Enough tokens for every expert to be chosen, and to be beyond the length that dynamic rope starts at."""
    name, config = hf_models.VARIANTS[variant]
    if name in WITH_EXPERTS:
        return hf_models.prompts(batch=16, length=60)
    scaling = config.get("rope_parameters") or {}
    return hf_models.prompts(length=80 if scaling.get("rope_type") == "dynamic" else 24)


@pytest.mark.parametrize("variant", hf_models.variants())
def test_logits_equal_transformers(variant: str, tmp_path: Path):
    directory = hf_models.save(variant, tmp_path, tokenizer=False)
    ids = prompts(variant)
    expected = hf_models.logits(directory, ids)
    assert expected.std() > 0.5, "logits so flat that errors hide"
    torch.testing.assert_close(mcore_logits(directory, ids), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_every_expert_has_a_part_in_the_logits(name: str, tmp_path: Path):
    """So that the comparison with transformers is one of all experts of all layers."""
    variant = next(iter(families.facts(name).VARIANTS))
    directory = hf_models.save(variant, tmp_path, tokenizer=False)
    with parallel.single_process():
        (model,) = bridge.load_model(directory)
        ids = prompts(variant).to(platform.device())
        positions = torch.arange(ids.size(1)).to(ids).expand_as(ids)
        with torch.no_grad():
            logits = model.eval()(ids, positions, None)
            experts = {key: held for key, held in shards.pieces([model]).items() if "linear_fc2.weight[" in key}
            assert len(experts) > 4
            for key, held in experts.items():
                if key.startswith("mtp."):
                    continue  # predicts a further token: no part of these logits
                weight = held.pieces[0].data
                kept = weight.clone()
                weight.zero_()
                assert (model(ids, positions, None) - logits).abs().max() > 10 * TOLERANCE, key
                weight.copy_(kept)


# Lists by layer that transformers works out from other fields, which are all that files on the hub have.
WORKED_OUT = {"layer_types", "no_rope_layers"}


def hub_style(hf: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The same config as files on the hub have it: rope_theta, rope_scaling with `type`, torch_dtype, and lists by
    layer only where they are `given`."""
    gone = {"rope_parameters", "dtype"} | (WORKED_OUT - given.keys())
    old = {name: value for name, value in hf.items() if name not in gone} | {"torch_dtype": hf.get("dtype")}
    if "rope_parameters" not in hf:
        return old
    rope = dict(hf["rope_parameters"])
    old |= {"rope_theta": rope.pop("rope_theta")}
    old |= {"partial_rotary_factor": rope.pop("partial_rotary_factor")} if "partial_rotary_factor" in rope else {}
    kind = rope.pop("rope_type")
    return old | ({"rope_scaling": {"type": kind, **rope}} if kind != "default" else {})


@pytest.mark.parametrize("variant", hf_models.variants())
def test_config_means_the_same_after_a_round_trip(variant: str, tmp_path: Path):
    from tests.auto import AutoConfig

    hf_models.config(variant).save_pretrained(tmp_path)
    hf = hf_config.read(tmp_path)
    section = hf_config.to_mcore(hf)
    name, given = hf_models.VARIANTS[variant]
    hub = families.get(name, "HUB")
    assert hf_config.to_mcore(hub(hf) if hub else hub_style(hf, given)) == section
    unchanged = hf_config.to_hf(section, dtype="float32", source=hf)
    assert {name: value for name, value in unchanged.items() if name != "dtype"} == {
        name: value for name, value in hf.items() if name != "dtype"
    }
    fresh = hf_config.to_hf(section, dtype="float32")
    assert hf_config.to_mcore(fresh) == section
    (tmp_path / "config.json").write_text(json.dumps(fresh))
    loaded, original = AutoConfig.from_pretrained(tmp_path).to_dict(), hf_models.config(variant).to_dict()
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype", "_name_or_path", "model_type"}
    # Without a window transformers keeps a number that it does not read.
    unread = set() if original.get("use_sliding_window") else {"max_window_layers"}
    unread |= set(families.get(name, "UNREAD"))
    assert {k: v for k, v in loaded.items() if k not in tokens | unread} == {
        k: v for k, v in original.items() if k not in tokens | unread
    }


@pytest.mark.parametrize("name", family.known_names())
def test_defaults_are_those_of_the_transformers_class(name: str):
    from tests.auto import AutoConfig

    facts = family.by_name(name)
    kind = type(AutoConfig.for_model(facts.class_of or facts.model_type))
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for field, value in facts.hf_defaults.items():
        assert defaults[field] == value, field
    shaped = {field for part in facts.parts for field in part.hf_names}
    for field, value in defaults.items():
        if field in shaped and field not in facts.hf_defaults | dict.fromkeys(hf_config.REQUIRED):
            assert value is None, f"{field}: transformers' default {value} is not in hf_defaults"


@pytest.mark.parametrize("name", family.known_names())
def test_a_config_that_says_nothing_of_rotary_embeddings_means_what_transformers_fills_in(name: str, tmp_path: Path):
    variant = next(iter(families.facts(name).VARIANTS))
    hf_models.config(variant).save_pretrained(tmp_path)
    silent = {key: value for key, value in hf_config.read(tmp_path).items() if not key.startswith(("rope_", "partial"))}
    silent["model_type"] = family.by_name(name).class_of or silent["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(silent))
    filled = auto_config(tmp_path)
    filled.save_pretrained(tmp_path / "filled")
    assert hf_config.to_mcore(silent) == hf_config.to_mcore(hf_config.read(tmp_path / "filled"))


def auto_config(directory: Path) -> Any:
    from tests.auto import AutoConfig

    return AutoConfig.from_pretrained(directory)


# Another value for every field of the config classes.
CHANGES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "hidden_act": "gelu",
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "rms_norm_eps": 1e-1,
    "use_cache": False,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0},
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.3,
    "pretraining_tp": 2,
    "sliding_window": 3,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "pad_token_id": 3,
    "bos_token_id": 5,
    "eos_token_id": 7,
    "output_hidden_states": True,
    "return_dict": True,
    "dtype": "bfloat16",
    "chunk_size_feed_forward": 4,
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "problem_type": "regression",
    "architectures": None,
    "transformers_version": "4.0",
}
REFUSED = {"is_encoder_decoder": True}
# Fields that change which tensors there are, or their shapes: the weights of the old config must then be refused.
SHAPES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
attention_bias mlp_bias tie_word_embeddings""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", family.known_names())
def test_every_field_of_the_config_class_reaches_our_logits_or_is_refused(name: str, tmp_path: Path):
    """Change one field at a time: our logits follow transformers' to the new ones."""
    variant, on = next(iter(families.facts(name).VARIANTS)), families.get(name, "ON")
    changes, refused = CHANGES | families.get(name, "CHANGES"), REFUSED | families.get(name, "REFUSED")
    shapes = {*SHAPES, *families.get(name, "SHAPES")}
    fields = {field.name for field in dataclasses.fields(type(hf_models.config(variant)))} - {"num_labels"}
    assert fields <= changes.keys() | refused.keys(), f"say how to change {fields - changes.keys() - refused.keys()}"
    directory = hf_models.save(variant, tmp_path, tokenizer=False)
    hf, ids = hf_config.read(directory), hf_models.prompts()
    ours: dict[str, torch.Tensor] = {}  # logits by section: most fields are no part of it
    with parallel.single_process():
        for field in sorted(fields & changes.keys() - refused.keys()):
            (directory / "config.json").write_text(json.dumps({**hf, **on, field: changes[field]}))
            if field in shapes:
                with pytest.raises(ConversionError):
                    logits_of_section(hf_config.to_mcore(hf_config.read(directory)), directory, ids)
                continue
            section = hf_config.to_mcore(hf_config.read(directory))
            key = json.dumps(section, sort_keys=True)
            if key not in ours:
                ours[key] = logits_of_section(section, directory, ids)
            difference = (ours[key] - hf_models.logits(directory, ids)).abs().max()
            assert difference < TOLERANCE, f"{field} changes the logits of transformers but not ours"
    for field, value in refused.items():
        with pytest.raises(ConversionError, match=field):
            hf_config.to_mcore({**hf, field: value})
