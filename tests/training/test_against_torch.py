"""Steps from init.path against a plain PyTorch and transformers loop on the same data, with the same AdamW."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed import run_distributed
from tests.training.runs import ADAM, config, recorded, train

STEPS, BATCH, WARMUP = 20, 4, 3
OPTIMIZER = {**ADAM, "clip_grad": 0.5}


class Step(NamedTuple):
    loss: float
    grad_norm: float


def learning_rate(step: int, *, steps: int, peak: float) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then half a cosine down to a tenth at the last step."""
    low, high = peak / 10, peak
    if step <= WARMUP:
        return low + (high - low) * step / WARMUP
    done = (step - WARMUP) / (steps - WARMUP)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def samples(item: dict[str, Any]) -> Iterator[list[Any]]:
    """Tokens, labels and weights of each sample in a row, without its padding."""
    segments = item.get("segment_ids")
    parts = [slice(None)] if segments is None else [segments == number for number in segments.unique() if number >= 0]
    for part in parts:
        yield [item[name][part] for name in ("tokens", "labels", "loss_mask")]


def mean_loss(model: Any, items: list[dict[str, Any]]) -> Any:
    """Cross entropy by weight, every sample on its own."""
    import torch

    total, count = torch.zeros(()), 0.0
    for tokens, labels, weights in (sample for item in items for sample in samples(item)):
        losses = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0], labels, reduction="none")
        total, count = total + (losses * weights).sum(), count + weights.sum().item()
    return total / count


def plain_loop(directory: Path, data: Any, ids: list[list[int]], *, peak: float) -> list[Step]:
    """The whole of it: no megatron-core, no code of ours but the samples, of which each step reads `ids`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, OPTIMIZER["adam_beta2"]),
        eps=1e-8,
    )
    steps = []
    for step, read in enumerate(ids):
        loss = mean_loss(model, [data[index] for index in read])
        optimizer.zero_grad()
        loss.backward()
        # In 64 bits: clip_grad_norm_ takes torch's norm in 32, which for nine million numbers is off by more than 1e-4.
        norm = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]).norm()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), OPTIMIZER["clip_grad"], norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=len(ids), peak=peak)
        optimizer.step()
        steps.append(Step(loss.item(), norm.item()))
    return steps


ALONE: Mapping[str, dict[str, Any]] = {"one": {}}


def compare(
    directory: Path,
    tmp_path: Path,
    *,
    data: dict[str, Any],
    peak: float,
    layouts: Mapping[str, dict[str, Any]] = ALONE,
    steps: int = STEPS,
) -> list[dict[str, Any]]:
    """Both loops from the weights in `directory`; learning rates rise to `peak`. A layout but "one" has two ranks.

    Returns the items that "one" read.
    """
    from bridge.models.hf import config as hf_config

    model = hf_config.to_mcore(hf_config.read(directory))
    read_by, expected, samples = {}, [], {}
    for name, parallelism in layouts.items():
        run = config(
            tmp_path,
            name=name,
            whole_model=model,
            parallelism=parallelism,
            optimizer={**OPTIMIZER, "lr": peak, "min_lr": peak / 10},
            scheduler={"lr_warmup_steps": WARMUP, "lr_warmup_init": peak / 10},
            data=data,
            init={"path": str(directory)},
            log={"sample_ids": True},
            train={"steps": steps, "global_batch_size": BATCH, "micro_batch_size": 2, "eval_interval": None},
        )
        lines = run_distributed(train, 1 if name == "one" else 2, run)[0].lines
        read_by[name] = read_by_step(run.run_dir, steps=steps)
        if name == "one" or (data.get("packing") and "context_parallel_size" in parallelism):
            samples[name] = training_samples(run)
            expected = plain_loop(directory, samples[name], read_by[name], peak=peak)
        else:
            assert read_by[name] == read_by["one"]
        ours = [Step(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
        assert [step.loss for step in ours] == pytest.approx([step.loss for step in expected], rel=1e-4), name
        assert [step.grad_norm for step in ours] == pytest.approx([step.grad_norm for step in expected], rel=1e-4), name
        rates = [line["lr"] for line in lines if "loss" in line]
        assert rates == pytest.approx([learning_rate(step, steps=steps, peak=peak) for step in range(steps)])
    assert expected[-1].loss != pytest.approx(expected[0].loss, rel=1e-2)  # something was learnt
    return [samples["one"][index] for ids in read_by["one"] for index in ids]


def read_by_step(run_dir: Path, *, steps: int) -> list[list[int]]:
    """The ids of the samples that each step read, on all ranks."""
    read: list[list[int]] = [[] for _ in range(steps)]
    for file in sorted((run_dir / "sample_ids").iterdir()):
        for step, ids in recorded(file):
            read[step - 1] += ids
    return [sorted(ids) for ids in read]


def training_samples(run: Any) -> Any:
    """The training dataset of `run`, built in this process as on its first rank."""
    from bridge import parallel
    from bridge.training import setup

    data = setup.prepare_data(run)
    with parallel.fake(math.prod(run.parallelism.values()), 0, run.parallelism):
        return data.build(seed=run.train.seed).train


@pytest.mark.parametrize("variant", ["llama", "qwen2_tied"])
def test_tiny_model(tmp_path: Path, tiny_hf: Callable[..., Path], variant: str) -> None:
    data = {"source": "tests.training.masked", "vocab_size": 259, "sequence_length": 32}
    compare(tiny_hf(variant), tmp_path, data=data, peak=1e-3)


@pytest.mark.real
def test_going_on_with_a_real_model_on_real_text(tmp_path: Path, real_model: Callable[[str], Path]) -> None:
    from tests.real.fetch import fetch_file

    directory, text = real_model("stories15m"), fetch_file("wiki.txt")
    data = {"source": "text", "path": str(text), "tokenizer": str(directory), "cache_dir": str(tmp_path)}
    compare(directory, tmp_path, data={**data, "sequence_length": 64}, peak=1e-4, steps=5)


def first_layers(directory: Path, folder: Path, *, num_layers: int) -> Path:
    """The model in `directory` without its later layers: real weights, at a share of the time."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    later = tuple(f"model.layers.{layer}." for layer in range(num_layers, config["num_hidden_layers"]))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(later)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


PACKED = {"source": "instruct", "too_long": "drop", "packing": True, "sequence_length": 192}
TOOL_CALLS = {"source": "chat", "too_long": "truncate", "invalid": "drop", "sequence_length": 128}
LAYERS = 2  # 8 is the whole of MiniMind2
TP2, CP2 = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}


@pytest.mark.real
@pytest.mark.parametrize(
    ("file", "options", "layouts"),
    [
        ("alpaca_en.json", PACKED, {"tp2": TP2, "cp2": CP2}),
        ("glaive_toolcall_en.json", TOOL_CALLS, {"dp2": {}}),
    ],
    ids=["packed_alpaca", "tool_calls"],
)
def test_fine_tuning_of_real_weights_on_real_rows(
    tmp_path: Path, real_model: Callable[[str], Path], file: str, options: dict[str, Any], layouts: dict[str, Any]
) -> None:
    from tests.real.fetch import fetch_file

    directory = first_layers(real_model("minimind2"), tmp_path / "minimind2", num_layers=LAYERS)
    files = {"path": f"{fetch_file(file)}:100", "tokenizer": str(directory), "cache_dir": str(tmp_path)}
    items = compare(directory, tmp_path, data={**options, **files}, peak=1e-4, layouts={**ALONE, **layouts}, steps=5)
    if options.get("packing"):
        assert sum(len([*samples(item)]) for item in items) > 1.5 * len(items), "samples share rows"
