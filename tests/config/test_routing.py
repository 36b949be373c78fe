"""Which mcore dataclass a key reaches, and what is refused."""

from typing import Any

import pytest

from bridge.config import mcore_fields, modules, routing
from bridge.errors import ConfigError, shown

MODEL = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_sequence_length": 128,
}


def route(**sections: dict[str, Any]) -> routing.Routed:
    return routing.route({**sections, "model": MODEL | sections.get("model", {})})


def message(**sections: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        route(**sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_key_reaches_all_classes_that_have_it():
    routed = route(
        precision={"bf16": True, "params_dtype": "bf16", "grad_reduce_in_fp32": True},
        parallelism={"overlap_param_gather": True, "delay_wgrad_compute": False},
        optimizer={"lr": 1, "adam_eps": 1e-8},
        model={"rotary_base": 500_000, "make_vocab_size_divisible_by": 8, "activation_func": "silu"},
    )
    assert routed.family == "llama"
    assert routed.transformer == {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "activation_func": "silu",
        "rotary_base": 500_000,  # a field of MLATransformerConfig, too
        "bf16": True,
        "params_dtype": "bf16",
        "delay_wgrad_compute": False,
    }
    assert routed.ddp == {"grad_reduce_in_fp32": True, "overlap_param_gather": True, "delay_wgrad_compute": False}
    assert routed.optimizer == {
        "lr": 1,
        "adam_eps": 1e-8,
        "bf16": True,
        "params_dtype": "bf16",
        "overlap_param_gather": True,
    }
    assert routed.gpt == {
        "vocab_size": 101,
        "max_sequence_length": 128,
        "rotary_base": 500_000,
        "make_vocab_size_divisible_by": 8,
    }
    assert routed.origin["bf16"] == "precision.bf16"
    assert routed.origin["family"] == "model.family"


def test_null_that_is_the_default_counts_as_not_set():
    routed = route(model={"num_query_groups": None, "mtp_loss_scaling_factor": None})
    assert "num_query_groups" not in routed.transformer
    assert routed.transformer["mtp_loss_scaling_factor"] is None  # mcore's default is 0.1


def test_every_field_that_yaml_can_hold_is_accepted_with_its_default():
    import ast

    for part, fields in mcore_fields.targets().items():
        for name, field in fields.items():
            if name in routing._REFUSED or not mcore_fields.expressible(field) or name in MODEL:
                continue
            try:
                default = ast.literal_eval(field.default or "")
            except (ValueError, SyntaxError):
                continue
            routed = route(optimizer={name: default})
            assert default is None or getattr(routed, part)[name] == default


@pytest.mark.parametrize("part", ["transformer", "ddp", "optimizer", "gpt"])
def test_every_function_and_object_is_refused_by_name(part: str):
    for name, field in mcore_fields.targets()[part].items():
        if mcore_fields.expressible(field) or name == "activation_func":
            continue
        for value in (None, "x"):
            assert message(optimizer={name: value}).startswith(
                f"optimizer.{name}: cannot be set (value {shown(value)})"
            )


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("model", "hiden_size", 256, "model.hiden_size: unknown key (value 256); did you mean 'hidden_size'?"),
        ("model", "vocab_sise", 3, "model.vocab_sise: unknown key (value 3); did you mean 'vocab_size'?"),
        (
            "optimizer",
            "weigth_decay",
            0.1,
            "optimizer.weigth_decay: unknown key (value 0.1); did you mean 'weight_decay'?",
        ),
        (
            "parallelism",
            "tensor_parallel_size",
            2,
            "parallelism.tensor_parallel_size: unknown key (value 2); write parallelism.tensor_model_parallel_size=2",
        ),
        (
            "parallelism",
            "rope_parameters",
            {},
            "parallelism.rope_parameters: unknown key (value {}); it belongs to the model section: "
            "set model.rope_parameters",
        ),
        ("model", "num_layers", "4", "model.num_layers: '4' does not fit; set a whole number"),
        ("model", "num_layers", 0, "model.num_layers: 0 is not positive; set a whole number from 1 up"),
        ("precision", "bf16", 1, "precision.bf16: 1 does not fit; set true or false"),
        ("optimizer", "optimizer", "adan", "optimizer.optimizer: adan does not fit; set one of adam, sgd"),
        (
            "precision",
            "params_dtype",
            "fp8",
            "precision.params_dtype: fp8 does not fit; set one of fp32, bf16, fp16",
        ),
        (
            "model",
            "family",
            "lama",
            f"model.family: 'lama' is not known; set one of {', '.join(modules.known('models/families'))}",
        ),
        (
            "parallelism",
            "num_layers",
            8,
            "parallelism.num_layers: is also set as model.num_layers (here 8); keep one of the two",
        ),
        (
            "model",
            "rope_scaling",
            True,
            "model.rope_scaling: cannot be set (value true): rotary scaling has one key here; "
            "set model.rope_parameters",
        ),
        ("parallelism", "use_megatron_fsdp", True, "parallelism.use_megatron_fsdp: true is not supported: only"),
    ],
)
def test_refused_with_key_value_and_advice(section: str, key: str, value: Any, expected: str):
    assert message(**{section: {key: value}}).startswith(expected)


def test_section_that_is_no_mapping():
    with pytest.raises(ConfigError, match=r"^precision: bf16 is not a section"):
        routing.route({"model": MODEL, "precision": "bf16"})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["family", "num_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_missing_architecture_key(name: str):
    model = {key: value for key, value in MODEL.items() if key != name}
    with pytest.raises(ConfigError, match=rf"^model\.{name}: is missing"):
        routing.route({"model": model})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_rope_parameters_pass_through():
    assert route(model={"rope_parameters": LLAMA3}).transformer["rope_parameters"] == LLAMA3
    assert "rope_parameters" not in route(model={"rope_parameters": None}).gpt


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_type": "lama3"}, ".rope_type: lama3 does not fit"),
        ({"rope_theta": 1e4}, ".rope_theta: belongs to another key (value 10000.0); set model.rotary_base"),
        ({"facter": 2.0}, ".facter: unknown key (value 2.0); did you mean 'factor'?"),
        ({"factor": "2"}, ".factor: '2' does not fit; set a number"),
        ({"rope_type": "longrope"}, ".low_freq_factor: unknown key (value 1.0)"),
    ],
)
def test_wrong_rope_parameters(change: dict[str, Any], expected: str):
    assert message(model={"rope_parameters": LLAMA3 | change}).startswith(f"model.rope_parameters{expected}")


def test_rope_parameters_without_what_they_need():
    text = message(model={"rope_parameters": {"rope_type": "linear"}})
    assert text == "model.rope_parameters.factor: is missing; rope_type linear needs it"
