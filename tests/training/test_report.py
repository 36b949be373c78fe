"""What a run leaves behind: metrics.jsonl, TensorBoard, Weights & Biases, and what it says when the loss is lost."""

import dataclasses
import json
import os
import re
import struct
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bridge.config import run_config
from bridge.errors import ConfigError
from tests.distributed import run_distributed
from tests.parallelism.models import LATENT
from tests.training.runs import config, sample_ids, train

ROOT = Path(__file__).resolve().parents[2]
# A dense layer, one with experts, and a prediction module with experts, balanced in every way there is.
EVERY_NUMBER = {
    **LATENT,
    "num_layers": 2,
    "moe_layer_freq": [0, 1],
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.01, 0.02, 0.03],
}


def documented() -> set[str]:
    """The names in the tables of docs/metrics.md."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_metrics_are_the_documented_ones_and_what_a_computation_by_hand_gives(tmp_path: Path) -> None:
    """In a run that is resumed after its second step, of two micro-batches each."""
    run = config(
        tmp_path,
        whole_model=EVERY_NUMBER,
        data={"source": "tests.training.masked", "sequence_length": 16, "vocab_size": 100, "num_samples": 50},
        objective={"name": "tests.training.experts_by_hand", "micro_batches": 2},
        train={"steps": 4, "eval_interval": 4, "global_batch_size": 2},
        scheduler={"lr_warmup_steps": 1},
        log={"log_interval": 3, "sample_ids": True},
    )
    began = time.time()
    stopped = dataclasses.replace(run, train=dataclasses.replace(run.train, exit_interval=2))
    run_distributed(stop_and_go_on, 1, stopped, run)
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    names = {re.sub(r"mtp_\d+_loss", "mtp_N_loss", name) for line in lines for name in line}
    assert {name for name in names if "by_hand" not in name} == documented() - {"NAME", "eval_NAME"}

    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["consumed_samples"] for line in steps] == [2, 4, 6, 8]
    for line in steps:
        for name in line:
            if name.startswith("by_hand_"):
                assert line[name.removeprefix("by_hand_")] == pytest.approx(line[name], rel=1e-5), (line["step"], name)
        assert sum(name.startswith("by_hand_") for name in line) == 7
    ids = sample_ids(run.run_dir)[0]
    lengths = [16 * (index % 5 + 1) // 5 for index in ids]
    assert [line["consumed_tokens"] for line in steps] == [sum(lengths[: 2 * number]) for number in (1, 2, 3, 4)]
    for number, line in enumerate(steps):
        tokens = line["tokens_per_second"] * line["step_seconds"]
        assert tokens == pytest.approx(sum(lengths[2 * number : 2 * number + 2]))
    assert [line["step"] for line in lines if "eval_loss" in line] == [4]
    times = [line["time"] for line in lines]
    assert times == sorted(times) and began < times[0] and times[-1] < time.time()


def test_a_number_cannot_have_the_name_of_another() -> None:
    from types import SimpleNamespace

    from bridge.training import metrics

    model = SimpleNamespace(num_moe_experts=None, mtp_num_layers=1)
    for name in ("lr", "mtp_1_loss", "tokens_per_expert_max"):
        with pytest.raises(ConfigError, match=f"^objective.name: 'policy' reports {name}, .*; give it another one"):
            metrics.check_names(SimpleNamespace(name="policy", numbers=("kl", name)), model)
    metrics.check_names(SimpleNamespace(name="policy", numbers=("kl", "mtp_2_loss")), model)


def stop_and_go_on(stopped: Any, run: Any) -> None:
    """One run in this process, in two parts."""
    train(stopped)
    train(run)


def test_lines_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    from bridge.training import metrics

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1.0}\n{"step": 3}\n{"step": 4, "lo')
    sink = metrics.JsonLines(tmp_path, resumed_step=2)
    sink.write({"step": 3, "loss": 0.5})
    sink.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1].pop("time") == pytest.approx(time.time(), abs=60)
    assert lines == [
        {"step": 1},
        {"step": 2},
        {"step": 2, "eval_loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]


def test_model_flops_of_a_llama_3_2_1b() -> None:
    from types import SimpleNamespace

    from bridge.training import flops

    # Llama-3.2-1B: 8.22 GFLOP per token at 4096 tokens, 9.03 at 8192.
    llama = SimpleNamespace(
        hidden_size=2048,
        num_layers=16,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        ffn_hidden_size=8192,
        gated_linear_unit=True,
        num_moe_experts=None,
        mtp_num_layers=None,
    )
    assert flops.per_token(llama, vocab_size=128256, sequence_length=4096) == pytest.approx(8.22e9, rel=1e-3)
    assert flops.per_token(llama, vocab_size=128256, sequence_length=8192) == pytest.approx(9.03e9, rel=1e-3)


def test_tensorboard_and_offline_wandb_go_on_after_a_resume(tmp_path: Path) -> None:
    log = {
        "tensorboard": True,
        "wandb": {"project": "bridge-tests", "mode": "offline", "group": "together", "tags": ["a", "b"]},
    }
    run_distributed(train, 1, config(tmp_path, log=log, train={"exit_interval": 10}))
    run_id = (tmp_path / "run" / "wandb_run_id").read_text()
    run = config(tmp_path, log=log)
    run_distributed(train, 1, run)

    assert (run.run_dir / "wandb_run_id").read_text() == run_id
    offline = sorted((run.run_dir / "wandb").glob(f"offline-run-*-{run_id}"))
    assert sum(len(list(folder.glob("*.wandb"))) for folder in offline) >= 1
    records = wandb_records(run.run_dir / "wandb")
    assert steps_with_a_loss(records) == list(range(1, 21))
    started = next(record.run for record in records if record.HasField("run"))
    assert (started.run_group, list(started.tags)) == ("together", ["a", "b"])
    kept = {item.key: json.loads(item.value_json) for item in started.config.update}
    environment = kept.pop("environment")
    kept.pop("_wandb")  # its own
    assert kept == {**json.loads(json.dumps(dataclasses.asdict(run))), "train": kept["train"]}
    assert kept["train"]["global_batch_size"] == 4

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 21))
    assert [event.step for event in events.Scalars("eval_loss")] == [10, 20]
    (text,) = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")][-1:]
    shown = yaml.safe_load(textwrap.dedent(text))
    assert run_config.from_dict(shown) == run

    starts = [json.loads(line) for line in (run.run_dir / "environment.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 10]
    assert environment == starts[0]
    assert starts[1]["versions"]["torch"] == torch.__version__ and starts[1]["host"] == os.uname().nodename
    assert starts[1]["versions"]["megatron-core"] == "0.16.1" and starts[1]["processes"] == 1
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (starts[1]["bridge_commit"] or "").removesuffix("-dirty") == head


def wandb_records(folder: Path) -> list[Any]:
    """What the offline files of all sessions hold, in order."""
    from wandb.proto import wandb_internal_pb2

    files = [path.read_bytes()[7:] for path in sorted(folder.glob("offline-run-*/*.wandb"))]
    return [wandb_internal_pb2.Record.FromString(content) for data in files for content in leveldb_records(data)]


def steps_with_a_loss(records: list[Any]) -> list[int]:
    return [
        record.history.step.num
        for record in records
        if "loss" in {item.key or "/".join(item.nested_key) for item in record.history.item}
    ]


def leveldb_records(data: bytes, *, header: int = 7, block: int = 32768) -> list[bytes]:
    """Records of a .wandb file after its own header: LevelDB's log format, of blocks counted with that header."""
    records, position = [b""], 0
    while position + header <= len(data):
        if (room := block - (position + header) % block) < header:
            position += room
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        records[-1] += data[position + header : position + header + size]
        position += header + size
        if kind in (1, 4):  # whole, or the last part
            records.append(b"")
    return [record for record in records if record]


def test_a_loss_that_is_not_a_number_fails_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    wild = {"optimizer": {"lr": 1e30, "min_lr": 1e30, "clip_grad": 0.0}, "scheduler": {"lr_warmup_steps": 0}}
    run = config(tmp_path, checkpoint={"save_interval": 1, "keep_last": 1})
    run_distributed(train, 1, dataclasses.replace(run, train=dataclasses.replace(run.train, exit_interval=5)))
    diverging = config(tmp_path, checkpoint={"save_interval": 10, "keep_last": 1}, **wild)
    with pytest.raises(AssertionError, match=r"FloatingPointError: step \d+: (loss|grad_norm) is (nan|inf)") as caught:
        run_distributed(train, 1, diverging)
    assert "the last checkpoint was saved before this step" in str(caught.value)
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*")]
    assert saved == ["iter_0000005"]


def test_fp16_counts_the_steps_it_leaves_out_and_bf16_trains(tmp_path: Path) -> None:
    fp16 = {"fp16": True, "params_dtype": "fp16", "pipeline_dtype": "fp16", "initial_loss_scale": 2.0**24}
    lines = run_distributed(train, 1, config(tmp_path, precision=fp16, train={"eval_interval": None}))[0].lines
    steps = [line for line in lines if "loss" in line]
    skipped = [line["grad_norm"] is None for line in steps]
    assert skipped[0] and not all(skipped)
    assert [line["skipped"] for line in steps] == [sum(skipped[: index + 1]) for index in range(20)]
    first_taken = skipped.index(False)
    assert all(line["lr"] == steps[0]["lr"] for line in steps[: first_taken + 1])  # the schedule waits

    bf16 = {"bf16": True, "params_dtype": "bf16", "pipeline_dtype": "bf16"}
    full = run_distributed(train, 1, config(tmp_path, name="fp32"))[0]
    half = run_distributed(train, 1, config(tmp_path, name="bf16", precision=bf16))[0]
    assert half.lines[0]["loss"] == pytest.approx(full.lines[0]["loss"], rel=1e-2)
    assert half.eval_loss == pytest.approx(full.eval_loss, rel=5e-2)


def test_sgd_resumes_with_its_momentum(tmp_path: Path) -> None:
    sgd = {"optimizer": "sgd", "lr": 0.1, "sgd_momentum": 0.9}
    straight = run_distributed(train, 1, config(tmp_path, name="straight", optimizer=sgd))[0]
    run_distributed(train, 1, config(tmp_path, name="halves", optimizer=sgd, train={"exit_interval": 10}))
    halves = run_distributed(train, 1, config(tmp_path, name="halves", optimizer=sgd))[0]
    assert [line.get("loss") for line in halves.lines] == [line.get("loss") for line in straight.lines]


def test_a_resumed_run_obeys_the_new_learning_rate(tmp_path: Path) -> None:
    run_distributed(train, 1, config(tmp_path, train={"exit_interval": 10}))
    changed = config(tmp_path, optimizer={"lr": 5e-3, "min_lr": 5e-3}, scheduler={"lr_decay_style": "constant"})
    lines = run_distributed(train, 1, changed)[0].lines
    assert [line["lr"] for line in lines if "loss" in line][10:] == [5e-3] * 10
