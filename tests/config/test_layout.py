"""Layout rules. Numbers are worked out by hand; every refusal must show its formula and legal values near."""

from typing import Any

import pytest

from bridge.config import layout, routing
from bridge.config.layout import Layout, batch, pipeline
from bridge.config.schema import Train
from bridge.errors import ConfigError
from tests.config.messages import says
from tests.config.refused_layouts import CP, EP, ETP, EXPERTS, INTERLEAVED, MODEL, PP, REFUSED, TP, VPP


def check(parallelism: dict[str, Any], *, model: dict[str, Any] | None = None, **sizes: Any) -> Layout:
    routed = routing.route(
        {"model": MODEL | (model or {}), "parallelism": parallelism, "precision": {"pipeline_dtype": "fp32"}}
    )
    sizes = {"world_size": 1, "sequence_length": 64, "global_batch_size": 24, "micro_batch_size": 1} | sizes
    world_size, sequence_length = sizes.pop("world_size"), sizes.pop("sequence_length")
    return layout.check(routed, world_size=world_size, sequence_length=sequence_length, train=Train(**sizes))


@pytest.mark.parametrize(
    ("parallelism", "sizes", "expected"),
    [
        ({}, {}, Layout(tp=1, pp=1, cp=1, ep=1, etp=1, dp=1, vpp=1, world_size=1)),
        ({}, {"world_size": 4}, Layout(tp=1, pp=1, cp=1, ep=1, etp=1, dp=4, vpp=1, world_size=4)),
        (
            {TP: 2, PP: 2, CP: 2, "sequence_parallel": True},
            {"world_size": 16},
            Layout(tp=2, pp=2, cp=2, ep=1, etp=2, dp=2, vpp=1, world_size=16),
        ),
        ({TP: 12}, {"world_size": 12}, Layout(tp=12, pp=1, cp=1, ep=1, etp=12, dp=1, vpp=1, world_size=12)),
        ({PP: 2, **INTERLEAVED}, {"world_size": 2}, Layout(1, 2, 1, 1, 1, dp=1, vpp=2, world_size=2)),
        ({PP: 3, VPP: 2}, {"world_size": 3}, Layout(1, 3, 1, 1, 1, dp=1, vpp=2, world_size=3)),
        ({PP: 3, "num_layers_in_first_pipeline_stage": 2}, {"world_size": 3}, Layout(1, 3, 1, 1, 1, 1, 1, 3)),
        (
            {PP: 2, "num_layers_in_first_pipeline_stage": 5, "num_layers_in_last_pipeline_stage": 7},
            {"world_size": 2},
            Layout(1, 2, 1, 1, 1, 1, 1, 2),
        ),
        (
            {PP: 2, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
            {"world_size": 2},
            Layout(1, 2, 1, 1, 1, 1, 1, 2),
        ),
        ({PP: 2, "pipeline_model_parallel_layout": "Et*5|t*7L"}, {"world_size": 2}, Layout(1, 2, 1, 1, 1, 1, 1, 2)),
        (
            {PP: 4, "pipeline_model_parallel_layout": "Et|(tt|)*5t|,L"},
            {"world_size": 4},
            Layout(1, 4, 1, 1, 1, 1, 2, 4),
        ),
        (
            {EP: 2, "model": EXPERTS},
            {"world_size": 4},
            Layout(tp=1, pp=1, cp=1, ep=2, etp=1, dp=4, vpp=1, world_size=4),
        ),
        (
            {TP: 2, ETP: 1, EP: 2, "sequence_parallel": True, "model": EXPERTS},
            {"world_size": 2},
            Layout(tp=2, pp=1, cp=1, ep=2, etp=1, dp=1, vpp=1, world_size=2),
        ),
        ({}, {"rampup_batch_size": [8, 4, 100], "micro_batch_size": 4}, Layout(1, 1, 1, 1, 1, 1, 1, 1)),
    ],
)
def test_legal_layout(parallelism: dict[str, Any], sizes: dict[str, Any], expected: Layout):
    parallelism = dict(parallelism)
    assert check(parallelism, model=parallelism.pop("model", None), **sizes) == expected


@pytest.mark.parametrize(("parallelism", "sizes", "expected"), REFUSED)
def test_refused_layout(parallelism: dict[str, Any], sizes: dict[str, Any], expected: str):
    parallelism = dict(parallelism)
    model = parallelism.pop("model", None)
    with pytest.raises(ConfigError) as caught:
        check(parallelism, model=model, **sizes)
    assert says(expected, str(caught.value)), caught.value


def test_pipeline_needs_the_dtype_of_its_messages():
    routed = routing.route({"model": MODEL, "parallelism": {PP: 2}})
    with pytest.raises(ConfigError, match=r"^precision\.pipeline_dtype: is missing with PP = 2"):
        layout.check(routed, world_size=2, sequence_length=64, train=Train(global_batch_size=8))


def test_proposed_values_are_legal():
    """What a message proposes is accepted when tried."""
    assert check({TP: 6}, world_size=6).tp == 6
    assert check({PP: 4}, world_size=4).pp == 4
    assert check({PP: 6}, world_size=6).pp == 6
    assert check({CP: 2}, world_size=2, sequence_length=68).cp == 2
    assert check({EP: 3}, model=EXPERTS, world_size=3).ep == 3


def test_stages_are_counted_as_megatron_core_counts_them():
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    for spelled in ("Et*3|(tt|)*29,m|L", "Ett|ttL", "E(t|)*4tL", "(Et|t)*2|L"):
        stages = len(PipelineParallelLayerLayout.parse_str_to_list(spelled))
        assert pipeline.count_stages(spelled) == stages


def test_groups_of_optimizer_instances_need_a_package(monkeypatch: pytest.MonkeyPatch):
    keys = {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 2}
    monkeypatch.setattr(batch, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^parallelism\.num_distributed_optimizer_instances: .*pip install einops"):
        check(keys, world_size=4)
    monkeypatch.setattr(batch, "find_spec", lambda name: name)
    assert check(keys, world_size=4).dp == 4


def test_prediction_modules_under_cp_in_another_loop():
    """There the mean is the caller's choice; train.py's loop always divides by the tokens of all ranks."""
    sections = {"model": {**MODEL, "mtp_num_layers": 1}, "parallelism": {CP: 2}}
    with pytest.raises(ConfigError, match=r"^model\.calculate_per_token_loss: false with mtp_num_layers and CP = 2"):
        layout.check_model(routing.route(sections), world_size=2)
    sections["parallelism"]["calculate_per_token_loss"] = True
    assert layout.check_model(routing.route(sections), world_size=2).cp == 2
    assert check({CP: 2}, model={"mtp_num_layers": 1}, world_size=2).cp == 2
