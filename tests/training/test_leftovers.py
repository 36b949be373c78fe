"""What a run leaves behind in a process that goes on, for another run or for anything else: nothing."""

import gc
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.forks.sitecustomize import num_threads
from tests.training.runs import EXPERTS, MODEL, config, train


def left_by(*runs: Any) -> list[tuple[int, int]]:
    """After each run: modules that live, threads."""
    import torch

    left = []
    for run in runs:
        train(run)
        gc.collect()
        left.append((sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects()), num_threads()))
    return left


@pytest.mark.parametrize(("sharded", "model"), [(False, MODEL), (True, MODEL), (True, EXPERTS)])
def test_a_run_leaves_no_model_and_no_thread(tmp_path: Path, sharded: bool, model: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "whole_model": model,
        "parallelism": {"use_distributed_optimizer": sharded},
        "train": {"steps": 4, "eval_interval": None},
        "checkpoint": {"save": False},
    }
    runs = [config(tmp_path, name=f"run_{number}", **options) for number in range(3)]
    (first, second, third) = run_distributed(left_by, 1, *runs, fresh=True)[0]
    assert first[0] == 0 and first == second == third
