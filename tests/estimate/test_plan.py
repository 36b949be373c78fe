"""Plans against known practice, against the rules of layouts, and the sizes they are made of against real builds."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge import parallel
from bridge.config import layout, run_config
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.estimate import memory, pieces, plan, plan_text
from bridge.estimate.plan import Plan
from bridge.launch import driver
from bridge.models import gpt
from tests.training.runs import config as small

ROOT = Path(__file__).resolve().parents[2]


def config(model: str, *, batch: int, length: int = 4096, **top: Any) -> RunConfig:
    """A run of conf/model/MODEL.yaml in bf16 on random tokens, `batch` sequences of `length` tokens per step."""
    return run_config.from_dict(
        {
            "name": "planned",
            "model": yaml.safe_load((ROOT / f"conf/model/{model}.yaml").read_text()),
            "precision": yaml.safe_load((ROOT / "conf/precision/bf16.yaml").read_text()),
            "optimizer": {"optimizer": "adam", "lr": 1e-3},
            "parallelism": {},
            "peft": {"method": "none"},
            "data": {"source": "mock", "sequence_length": length},
            "train": {"global_batch_size": batch},
            **top,
        }
    )


def best(run: RunConfig, gpus: int) -> Plan:
    return plan.plans(run, cluster=plan.cluster_of(run, world_size=gpus))[0]


def test_a_small_model_is_replicated_and_its_optimizer_sharded():
    first = best(config("llama3_2_1b", batch=256), 8)
    assert first.shape == layout.Layout(tp=1, pp=1, cp=1, ep=1, etp=1, dp=8, vpp=1, world_size=8)
    assert first.fields["use_distributed_optimizer"]
    assert not first.fields.get("recompute_granularity")


def test_a_large_model_is_divided_by_tensor_within_a_node_and_by_pipeline_across():
    """Megatron Bridge trains Llama-3 70B in bf16 on 64 H100 with TP 4, PP 4, CP 2, interleaved, micro-batch 1."""
    shape = best(config("llama3_1_70b", batch=256, length=8192), 64).shape
    assert 2 <= shape.tp <= 8
    assert shape.pp >= 2
    assert shape.vpp > 1


def test_experts_are_dealt_out():
    """Megatron Bridge trains Qwen3-30B-A3B on 16 H100 with experts over 8 or 16, no tensor parallelism."""
    shape = best(config("qwen3_30b_a3b", batch=512), 16).shape
    assert shape.ep >= 4
    assert shape.tp == 1


def test_long_sequences_are_divided():
    shape = best(config("llama3_1_8b", batch=32, length=131072), 64).shape
    assert shape.cp >= 4


def test_more_memory_never_makes_the_first_slower():
    run = config("llama3_1_8b", batch=128, length=8192)
    seconds = [best(dataclasses.replace(run, plan_memory_gib=size), 8).costs.total for size in (50, 80, 140, 1000)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_what_cannot_fit_says_how_much_it_needs():
    with pytest.raises(ConfigError) as raised:
        best(config("llama3_1_70b", batch=64, length=8192), 8)
    message = str(raised.value)
    assert message.startswith(
        "plan_memory_gib: no layout of this model fits 8 GPUs of 80 GiB; the smallest found needs"
    )
    needed = float(message.split("needs ")[1].split(" GiB")[0])
    assert 18 * 70.5e9 / 8 / 2**30 < needed < 1.3 * 18 * 70.5e9 / 8 / 2**30  # bytes of state alone, bf16 and fp32


def test_an_illegal_batch_is_refused_by_the_rule_it_breaks():
    with pytest.raises(ConfigError, match="train.global_batch_size"):
        best(config("llama3_2_1b", batch=3, train={"global_batch_size": 3, "micro_batch_size": 2}), 8)


@pytest.mark.parametrize(
    ("model", "gpus", "batch"), [("llama3_1_8b", 8, 64), ("deepseek_v2_lite", 16, 512), ("deepseek_v3", 512, 8192)]
)
def test_overrides_make_a_legal_run_of_the_promised_memory(model: str, gpus: int, batch: int):
    run = config(model, batch=batch, parallelism={"tensor_model_parallel_size": 1, "overlap_grad_reduce": False})
    for planned in plan.plans(run, cluster=plan.cluster_of(run, world_size=gpus))[:2]:
        sections = dataclasses.asdict(run)
        for key, value in plan.overrides(planned, run).items():
            section, name = key.split(".")
            sections[section][name] = value
        made = run_config.from_dict(sections)
        length = made.data["sequence_length"]
        shape = layout.check(made.routed, world_size=gpus, sequence_length=length, train=made.train)
        assert shape == planned.shape
        fullest = max(stage.total for stage in memory(made, world_size=gpus, fused=True)) + 2 * 2**30
        assert planned.memory == pytest.approx(fullest, rel=0.002)


TIED_EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_layer_freq": [0, 1, 1, 1],
    "num_layers": 4,
    "mtp_num_layers": 1,
    "share_embeddings_and_output_weights": True,
}
UNEQUAL = {"num_layers": 3, "num_query_groups_by_layer": [2, 0, 4], "ffn_hidden_size_by_layer": [64, 32, 0]}
LEARNED = {"num_layers": 4, "position_embedding_type": "learned_absolute", "add_bias_linear": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = [
    (1, {}, {}),
    (2, LEARNED, TP2),
    (2, LEARNED, PP2 | {"pipeline_model_parallel_layout": "Ett|ttL"}),
    (4, LEARNED, TP2 | PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    (3, {"num_layers": 5}, {"pipeline_model_parallel_size": 3, "num_layers_in_last_pipeline_stage": 1}),
    (2, {"num_layers": 3}, PP2 | {"account_for_loss_in_pipeline_split": True}),
    (2, UNEQUAL, TP2),
    (4, TIED_EXPERTS, PP2 | {"expert_model_parallel_size": 2}),
    (4, TIED_EXPERTS, TP2 | {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}),
    (8, TIED_EXPERTS, TP2 | PP2 | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
]


@pytest.mark.parametrize(("world_size", "model", "parallelism"), LAYOUTS)
def test_sizes_are_those_of_a_real_build(world_size: int, model: dict[str, Any], parallelism: dict[str, Any]):
    """Every parameter's, in its order, on every pipeline stage."""
    routed = small(Path("runs"), model=model, parallelism=parallelism).routed
    shape = layout.derive(routed, world_size=world_size)
    made = pieces.of(routed, shape)
    for stage, chunks in enumerate(pieces.chunks(made, routed.transformer, shape)):
        with parallel.fake(world_size, stage * world_size // shape.pp, routed.transformer):
            built = gpt.build(routed, meta=True)
            expected = [[weight.numel() for weight in chunk.parameters()] for chunk in built]
        weights = [made.weights(chunk, stages=shape.pp, ep=shape.ep) for chunk in chunks]
        assert [[weight.size for weight in chunk] for chunk in weights] == expected
        sums = [sum(made.sizes(chunk, ep=shape.ep)) for chunk in chunks]
        assert sums == [sum(sizes) for sizes in expected]


def command(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python train.py ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        driver.main()
    return int(leaving.value.code or 0), *capsys.readouterr()


def test_command_line(tmp_path: Path, monkeypatch, capsys):
    """plan=true, and then the first layout's overrides with dry_run=true, as a user pastes them."""
    monkeypatch.chdir(tmp_path)
    wanted = ["model=llama3_2_1b", "precision=bf16", "data=mock", "data.sequence_length=8192", "train.num_devices=16"]
    wanted += ["train.global_batch_size=64"]
    code, out, error = command([*wanted, "plan=true", "plan_memory_gib=24"], monkeypatch, capsys)
    assert code == 0, error
    header, first = (line.split() for line in out.splitlines()[3:5])
    assert header[:4] == ["#", "TP", "PP", "VPP"]
    overrides = shlex.split(out.splitlines()[-1])
    code, out, error = command([*wanted, *overrides, "dry_run=true"], monkeypatch, capsys)
    assert code == 0, error
    assert f"16 = TP {first[1]} x PP {first[2]} x CP {first[4]} x DP {first[7]}" in out
    code, _, error = command([*wanted, "plan=true", "plan_memory_gib=1"], monkeypatch, capsys)
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("plan_memory_gib: no layout of this model fits 16 GPUs of 1 GiB")
    assert not list(tmp_path.iterdir())


def test_text_of_values():
    values = [True, None, 4, ["moe", "mla_up_proj"], "full"]
    assert [plan_text._text(value) for value in values] == ["true", "null", "4", "[moe,mla_up_proj]", "full"]
