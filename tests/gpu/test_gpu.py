"""What only a GPU with Transformer Engine can show. Run with -s to see the speeds.

Needs neither wandb nor tensorboard, no network, and about 40 GB of disk for the checkpoint of the 1 B model.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge import parallel, platform
from bridge.config.routing import route
from bridge.models import gpt
from bridge.sources.load import load_initial, read_section

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent.parent


# Experts and, of the second, latent attention: the published width, few layers and experts.
WITH_EXPERTS = {
    "olmoe_1b_7b": (),
    "deepseek_v2_lite": ("model.moe_layer_freq=[0,1,1]",),
}


def _train(folder: Path, *overrides: str) -> Path:
    """Run directory of `train.py` with `overrides`, which end with name=NAME."""
    _command(folder, "train.py", *overrides)
    return folder / "runs" / overrides[-1].removeprefix("name=")


def _command(folder: Path, script: str, *overrides: str, exit_code: int = 0) -> str:
    command = [sys.executable, str(ROOT / script), *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == exit_code, done.stdout[-4000:] + done.stderr[-8000:]
    print(done.stdout[-2000:])
    return done.stdout


def _metrics(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_default_command_trains(tmp_path: Path):
    run = _train(tmp_path, "train.num_devices=1", "name=default")
    losses = _metrics(run, "loss")
    assert len(losses) == 300
    assert losses[-1] < losses[0] - 2
    assert _metrics(run, "eval_loss")[-1] < 5.7  # half a nat below the unigram entropy of the held-out text


def test_one_billion_parameters_in_bfloat16(tmp_path: Path):
    """Llama-3.2-1B's geometry, random weights: trains on Transformer Engine's layers, and how fast."""
    run = _train(
        tmp_path,
        "recipe=llama3_2_1b_speed",
        "parallelism=dp_sharded",
        "data.vocab_size=2048",
        "train.num_devices=1",
        "optimizer.lr=1e-4",
        "log.log_interval=5",
        "name=llama1b",
    )
    losses, speed = _metrics(run, "loss"), _metrics(run, "tokens_per_second")[-1]
    tflops, peak = _metrics(run, "tflops_per_gpu")[-1], _metrics(run, "peak_memory_bytes")[-1] / 2**30
    print("Llama-3.2-1B geometry, bf16, sequence 4096, micro-batch 4:", end=" ")
    print(f"{speed:,.0f} tokens/s, {tflops:.0f} TFLOP/s, peak {peak:.1f} GiB")
    assert losses[-1] < losses[0] - 1  # to be learnt: only 2048 of 128256 ids occur


def test_local_checkpoint_in_transformer_engine(tmp_path: Path):
    """A checkpoint that torch's own layers wrote gives the same loss in Transformer Engine's layers."""
    run = _train(
        tmp_path,
        "precision=bf16",
        "model.transformer_impl=local",
        "train.num_devices=1",
        "train.steps=50",
        "train.eval_interval=null",
        "name=local",
    )
    local, engine = (_loss(run, implementation) for implementation in ("local", "transformer_engine"))
    print(f"loss of one checkpoint: local {local:.5f}, Transformer Engine {engine:.5f}")
    assert engine == pytest.approx(local, rel=5e-3)
    assert local < 7.0  # trained weights were loaded: ln(2048) = 7.6 otherwise


@pytest.mark.parametrize("model", WITH_EXPERTS)
def test_experts_train_resume_and_convert(tmp_path: Path, model: str):
    overrides = [
        *(f"model={model}", *WITH_EXPERTS[model], "model.num_layers=3", "model.num_moe_experts=8"),
        *("precision=bf16", "optimizer.lr=3e-4", "data=mock", "data.sequence_length=512", "train.eval_interval=null"),
        *("train.num_devices=1", "train.steps=10", "log.log_interval=1", f"name={model}"),
    ]
    _command(tmp_path, "train.py", "train.exit_interval=5", *overrides, exit_code=75)
    run = _train(tmp_path, *overrides)
    losses = _metrics(run, "loss")
    assert len(losses) == 10 and losses[-1] < losses[0] - 1
    _command(tmp_path, "convert.py", "mode=export", f"megatron={run}", "hf=hf")
    told = _command(tmp_path, "convert.py", "mode=verify", f"megatron={run}", "hf=hf", "tolerance=0.01")
    assert "verified" in told


@pytest.mark.parametrize("num_devices", [1, 2])
def test_background_saves_reruns_and_timings_change_nothing(tmp_path: Path, num_devices: int):
    """Stopped and resumed from a save that was written while training went on, each loss judged, each rank timed."""
    if platform.num_devices() < num_devices:
        pytest.skip(f"fewer than {num_devices} CUDA devices")
    overrides = [
        *("model=tiny", "precision=bf16", "parallelism=dp_sharded", f"train.num_devices={num_devices}"),
        *("train.steps=20", "train.eval_interval=null", "log.log_interval=1"),
    ]
    plain = _train(tmp_path, *overrides, "name=plain")
    overrides += ["checkpoint.save_interval=3", "checkpoint.async_save=true", "checkpoint.verify=true"]
    overrides += ["rerun.mode=validate_results", "log.straggler_interval=4", "name=watched"]
    _command(tmp_path, "train.py", "train.exit_interval=10", *overrides, exit_code=75)
    watched = _train(tmp_path, *overrides)
    assert _metrics(watched, "saved_step") == [3, 6, 9, 10, 12, 15, 18, 20]
    assert "slowest" in (watched / "logs" / "rank_0.log").read_text()
    assert _metrics(watched, "loss") == pytest.approx(_metrics(plain, "loss"), abs=0.01)


def test_an_optimizer_in_the_memory_of_the_cpu_changes_nothing(tmp_path: Path):
    """Half of the weights are updated on the CPU; stopped and resumed half-way."""
    overrides = [
        *("model=tiny", "precision=bf16", "parallelism=dp_sharded", "train.num_devices=1", "train.steps=20"),
        *("train.eval_interval=null", "log.log_interval=1", "+optimizer.use_precision_aware_optimizer=true"),
    ]
    plain = _train(tmp_path, *overrides, "name=plain")
    overrides += [
        "+optimizer.optimizer_cpu_offload=true",
        "+optimizer.optimizer_offload_fraction=0.5",
        "name=offloaded",
    ]
    _command(tmp_path, "train.py", "train.exit_interval=10", *overrides, exit_code=75)
    offloaded = _train(tmp_path, *overrides)
    assert _metrics(offloaded, "loss") == pytest.approx(_metrics(plain, "loss"), abs=0.01)


def test_cuda_graphs_change_nothing(tmp_path: Path):
    """Captured after the first step, replayed by the evaluations too, and captured anew after a stop."""
    overrides = [
        *("model=tiny", "precision=bf16", "train.num_devices=1", "train.steps=20", "train.eval_interval=5"),
        *("train.eval_samples=8", "log.log_interval=1"),
    ]
    plain = _train(tmp_path, *overrides, "name=plain")
    overrides += ["+model.cuda_graph_impl=local", "+model.use_te_rng_tracker=true", "name=graphs"]
    _command(tmp_path, "train.py", "train.exit_interval=10", *overrides, exit_code=75)
    graphs = _train(tmp_path, *overrides)
    for key in ("loss", "eval_loss"):
        assert _metrics(graphs, key) == pytest.approx(_metrics(plain, key), abs=0.01)


@pytest.mark.parametrize("tracker", ["false", "true"])
def test_dropout_goes_on_after_a_stop(tmp_path: Path, tracker: str):
    """Transformer Engine's attention holds the tracker it draws from; other masks change a loss by 1e-3 and more."""
    overrides = [
        *("model=tiny", "precision=fp32", "train.num_devices=1", "train.steps=8", "train.eval_interval=null"),
        *("train.global_batch_size=2", "data.sequence_length=64", "log.log_interval=1"),
        *("model.attention_dropout=0.3", f"+model.use_te_rng_tracker={tracker}"),
    ]
    straight = _metrics(_train(tmp_path, *overrides, "name=straight"), "loss")
    _command(tmp_path, "train.py", "train.exit_interval=4", *overrides, "name=halves", exit_code=75)
    halves = _metrics(_train(tmp_path, *overrides, "name=halves"), "loss")
    print(f"apart: {[one - other for one, other in zip(straight, halves, strict=True)]}")
    assert halves == pytest.approx(straight, abs=1e-4)


FP8 = {
    "delayed, in attention too": ("+precision.fp8_recipe=delayed", "+precision.fp8_dot_product_attention=true"),
    "tensorwise": ("+precision.fp8_recipe=tensorwise",),
    "blockwise": ("+precision.fp8_recipe=blockwise",),
}


def test_fp8_learns_what_bfloat16_does(tmp_path: Path):
    """Through a stop, after which scales and their history are read from the checkpoint."""
    overrides = [
        # Attention in FP8 is trained on Hopper with 128 channels per head only.
        *("model=tiny", "model.kv_channels=128", "precision=bf16", "train.num_devices=1", "train.steps=40"),
        *("data.sequence_length=256", "train.eval_interval=null", "log.log_interval=1"),
    ]
    plain = _metrics(_train(tmp_path, *overrides, "name=plain"), "loss")
    for number, (recipe, settings) in enumerate(FP8.items()):
        quantized = [*overrides, "+precision.fp8=hybrid", *settings, f"name=fp8_{number}"]
        _command(tmp_path, "train.py", "train.exit_interval=20", *quantized, exit_code=75)
        losses = _metrics(_train(tmp_path, *quantized), "loss")
        print(f"FP8 {recipe}: {losses[-1] - plain[-1]:+.4f} nats at step 40")
        assert losses != plain
        assert losses == pytest.approx(plain, abs=0.1)


def _loss(run: Path, implementation: str) -> float:
    """Mean loss on fixed text of the checkpoint in `run`, bf16, with `model.transformer_impl` as asked."""
    from transformers import AutoTokenizer

    section: dict[str, Any] = read_section(run, key="path") | {"transformer_impl": implementation}
    routed = route({"model": section})
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoints" / "hf")
    text = (ROOT / "bridge" / "parallel.py").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"][:257]], device=platform.device())
    with parallel.single_process(), torch.no_grad():
        (model,) = chunks = gpt.build(routed, dtype=torch.bfloat16)
        load_initial(chunks, run, routed, key="path")
        modules = {type(module).__module__.partition(".")[0] for module in model.modules()}
        assert ("transformer_engine" in modules) == (implementation == "transformer_engine")
        positions = torch.arange(256, device=ids.device)[None]
        return model.eval()(ids[:, :-1], positions, None, labels=ids[:, 1:]).float().mean().item()
