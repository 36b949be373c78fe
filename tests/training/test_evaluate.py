"""The evaluation loss: the mean over the first samples held out, whatever the batch sizes and the layout."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ConfigError
from tests.distributed import run_distributed
from tests.hf_models import save
from tests.training.runs import config, train, train_and_print

SAMPLES = 13  # in the validation set, which no batch divides; each masks another share of its tokens
DATA = {"source": "tests.training.masked", "sequence_length": 16, "vocab_size": 259, "num_samples": 100 * SAMPLES}
WHOLE = {"eval_samples": None}
NAMED = {"source": "tests.training.named"}
# name -> sections, by the number of processes
CASES: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    1: {
        "batch 3": {"train": {"global_batch_size": 3, **WHOLE}},
        "batch 4, micro-batch 2": {"train": {"global_batch_size": 4, "micro_batch_size": 2, **WHOLE}},
        "batch 8, micro-batch 4": {"train": {"global_batch_size": 8, "micro_batch_size": 4, **WHOLE}},
        "batch 64": {"train": {"global_batch_size": 64, **WHOLE}},
        "more than there are": {"train": {"eval_samples": 128}},
        "first 5": {"train": {"global_batch_size": 4, "eval_samples": 5}},
        "named": {"data": NAMED, "train": {"global_batch_size": 8, **WHOLE}},
        "named, first 5": {"data": NAMED, "train": {"global_batch_size": 4, "eval_samples": 5}},
    },
    2: {
        "DP 2": {"train": {"global_batch_size": 4, **WHOLE}},
        "DP 2, batch 12": {"train": {"global_batch_size": 12, "micro_batch_size": 3, **WHOLE}},
        "DP 2, first 5": {"train": {"global_batch_size": 8, "micro_batch_size": 4, "eval_samples": 5}},
        "TP 2": {"parallelism": {"tensor_model_parallel_size": 2}, "train": {"global_batch_size": 8, **WHOLE}},
        "DP 2, named": {"data": NAMED, "train": {"global_batch_size": 4, **WHOLE}},
        "CP 2": {"parallelism": {"context_parallel_size": 2}, "train": {"global_batch_size": 3, **WHOLE}},
        "PP 2": {"parallelism": {"pipeline_model_parallel_size": 2}, "train": {"global_batch_size": 5, **WHOLE}},
        "VPP 2": {
            "parallelism": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "train": {"global_batch_size": 8, **WHOLE},
        },
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in Hugging Face format."""
    return save("llama", tmp_path_factory.mktemp("evaluate") / "hf")


def evaluation(directory: Path, folder: Path, **sections: Any) -> Any:
    from bridge.models.hf import config as hf_config

    model = hf_config.to_mcore(hf_config.read(directory))
    data = DATA | sections.pop("data", {})
    defaults = {"data": data, "init": {"path": str(directory)}, "eval_only": True}
    return config(folder, whole_model=model, **(defaults | sections))


def evaluate_all(runs: Mapping[str, Any]) -> dict[str, float]:
    """The loss of each, one after the other in this world; rank 0 writes everything to eval_output."""
    import functools

    import torch

    from bridge import parallel
    from bridge.platform import prepare

    prepare()
    parallel.teardown = functools.partial(parallel.teardown, keep_world=True)
    torch.distributed.init_process_group("gloo")
    return {name: train(run).eval_loss for name, run in runs.items()}


def by_transformers(directory: Path, run: Any) -> dict[str, float]:
    """Every number of the evaluation, sample by sample; no code of ours but the samples."""
    import torch
    from transformers import AutoModelForCausalLM

    from bridge.training import setup

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    valid = setup.prepare_data(run).build(seed=run.train.seed).valid
    sets = valid if isinstance(valid, dict) else {"": valid}
    assert sum(map(len, sets.values())) == SAMPLES
    sums = {}
    counts = {name: min(run.train.eval_samples or SAMPLES, len(dataset)) for name, dataset in sets.items()}
    with torch.no_grad():
        for name, dataset in sets.items():
            total = tokens = 0.0
            for index in range(counts[name]):
                sample = dataset[index]
                logits = model(sample["tokens"][None]).logits[0]
                losses = torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="none")
                total += (losses.double() * sample["loss_mask"]).sum().item()
                tokens += sample["loss_mask"].sum().item()
            sums[name] = (total, tokens)
    sums[""] = tuple(map(sum, zip(*sums.values(), strict=True)))
    counts[""] = sum(counts.values())
    found: dict[str, float] = {}
    for name, (total, tokens) in sums.items():
        behind = f"/{name}" if name else ""
        found |= {f"eval_loss{behind}": total / tokens, f"eval_perplexity{behind}": math.exp(total / tokens)}
        found |= {f"num_samples{behind}": counts[name]}
    return found


@pytest.mark.parametrize("world_size", CASES)
def test_it_is_the_mean_over_the_samples(directory: Path, tmp_path: Path, world_size: int) -> None:
    runs = {
        name: evaluation(directory, tmp_path, name="never", eval_output=str(tmp_path / f"{name}.json"), **sections)
        for name, sections in CASES[world_size].items()
    }
    ranks = run_distributed(evaluate_all, world_size, runs)
    for name, run in runs.items():
        expected = by_transformers(directory, run)
        assert [losses[name] for losses in ranks] == pytest.approx([expected["eval_loss"]] * world_size, rel=1e-6), name
        written = json.loads((tmp_path / f"{name}.json").read_text())
        written = {metric: value for metric, value in written.items() if metric not in ("path", "step", "data")}
        assert written == pytest.approx(expected, rel=1e-6), name
    assert not (tmp_path / "never").exists()


def test_each_set_is_reported_everywhere(tmp_path: Path) -> None:
    run = config(
        tmp_path,
        data={"source": "tests.training.named", "sequence_length": 16, "vocab_size": 100, "num_samples": 100 * SAMPLES},
        train={"steps": 2, "eval_interval": 2},
        scheduler={"lr_warmup_steps": 0},
        checkpoint={"save": False},
        log={"tensorboard": True},
    )
    (ran, output) = run_distributed(train_and_print, 1, run)[0]
    evaluation_line = next(line for line in ran.lines if "eval_loss" in line)
    metrics = {f"eval_{number}{name}" for number in ("loss", "perplexity") for name in ("", "/news", "/code")}
    assert evaluation_line.keys() == {"step", "time"} | metrics
    said = " | ".join(
        f"{name} {evaluation_line[f'eval_loss{key}']:.4f} (perplexity {evaluation_line[f'eval_perplexity{key}']:.4g})"
        for name, key in (("eval loss", ""), ("news", "/news"), ("code", "/code"))
    )
    assert f"step 2/2 | {said}\n" in output
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.run_dir / "tensorboard"))
    events.Reload()
    assert metrics <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        ({"a/b": [1]}, "data.eval: a/b cannot name an evaluation set; use a text without '/' and spaces"),
        ({"news": []}, "data.eval.news: holds no sample; leave it out, or give it some text"),
    ],
)
def test_sets_that_cannot_be(valid: Any, message: str) -> None:
    from bridge.training.evaluate import sets

    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        sets(valid)
