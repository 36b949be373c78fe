"""The evaluation loss: the mean over the first samples held out, whatever the batch sizes and the layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.hf_models import save
from tests.training.runs import config, train

SAMPLES = 13  # in the validation set, which no batch divides; each masks another share of its tokens
DATA = {"source": "tests.training.masked", "sequence_length": 16, "vocab_size": 259, "num_samples": 100 * SAMPLES}
WHOLE = {"eval_samples": None}
# name -> sections, by the number of processes
CASES: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    1: {
        "batch 3": {"train": {"global_batch_size": 3, **WHOLE}},
        "batch 4, micro-batch 2": {"train": {"global_batch_size": 4, "micro_batch_size": 2, **WHOLE}},
        "batch 8, micro-batch 4": {"train": {"global_batch_size": 8, "micro_batch_size": 4, **WHOLE}},
        "batch 64": {"train": {"global_batch_size": 64, **WHOLE}},
        "more than there are": {"train": {"eval_samples": 128}},
        "first 5": {"train": {"global_batch_size": 4, "eval_samples": 5}},
    },
    2: {
        "DP 2": {"train": {"global_batch_size": 4, **WHOLE}},
        "DP 2, batch 12": {"train": {"global_batch_size": 12, "micro_batch_size": 3, **WHOLE}},
        "DP 2, first 5": {"train": {"global_batch_size": 8, "micro_batch_size": 4, "eval_samples": 5}},
        "TP 2": {"parallelism": {"tensor_model_parallel_size": 2}, "train": {"global_batch_size": 8, **WHOLE}},
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
    defaults = {"data": DATA, "init": {"path": str(directory)}, "eval_only": True}
    return config(folder, whole_model=model, **(defaults | sections))


def evaluate_all(runs: Mapping[str, Any]) -> dict[str, float]:
    """The loss of each, one after the other in this world."""
    import functools

    import torch

    from bridge import parallel
    from bridge.platform import prepare

    prepare()
    parallel.teardown = functools.partial(parallel.teardown, keep_world=True)
    torch.distributed.init_process_group("gloo")
    return {name: train(run).eval_loss for name, run in runs.items()}


def by_transformers(directory: Path, run: Any, *, count: int) -> float:
    """Sample by sample, no code of ours but the samples."""
    import torch
    from transformers import AutoModelForCausalLM

    from bridge.training import setup

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    valid = setup.prepare_data(run).build(seed=run.train.seed).valid
    assert len(valid) == SAMPLES
    total = tokens = 0.0
    with torch.no_grad():
        for index in range(count):
            sample = valid[index]
            logits = model(sample["tokens"][None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="none")
            total += (losses.double() * sample["loss_mask"]).sum().item()
            tokens += sample["loss_mask"].sum().item()
    return total / tokens


@pytest.mark.parametrize("world_size", CASES)
def test_it_is_the_mean_over_the_samples(directory: Path, tmp_path: Path, world_size: int) -> None:
    runs = {
        name: evaluation(directory, tmp_path, name="never", **sections) for name, sections in CASES[world_size].items()
    }
    for losses in run_distributed(evaluate_all, world_size, runs):
        for name, run in runs.items():
            count = min(run.train.eval_samples or SAMPLES, SAMPLES)
            assert losses[name] == pytest.approx(by_transformers(directory, run, count=count), rel=1e-6), name
    assert not (tmp_path / "never").exists()
