"""Loss and gradient norm of every step depend on the global batch alone, not on how it is split."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.runs import Ran, config, losses, train

STEPS = 6

# name -> (processes, options). All start from the weights the reference run saves at its first step.
SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro_batch_4": (1, {"train": {"micro_batch_size": 4}}),
    "dp2": (2, {}),
    "dp2_distributed_optimizer_overlap": (
        2,
        {
            "parallelism": {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            "train": {"eval_interval": 2},
            "checkpoint": {"save_interval": 3},
        },
    ),
    "tp2_sp": (2, {"parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallelism": {"pipeline_model_parallel_size": 2}}),
    "cp2": (2, {"parallelism": {"context_parallel_size": 2}}),
    "loader_processes": (1, {"data": {"num_workers": 2}}),
}


def run(tmp_path: Path, name: str, **options: Any) -> Any:
    """A run that starts from the reference's weights; half its samples have a part of their tokens masked."""
    common: dict[str, Any] = {
        "data": {"source": "tests.training.masked", "sequence_length": 16, "vocab_size": 100, "num_samples": 50},
        "train": {"steps": STEPS, "eval_interval": None},
        "init": {"path": str(tmp_path / "start")},
    }
    merged = {key: {**common.get(key, {}), **options.get(key, {})} for key in common.keys() | options.keys()}
    return config(tmp_path, name=name, **merged)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    tmp_path = tmp_path_factory.mktemp("invariance")
    start = config(tmp_path, name="start", train={"steps": 5, "exit_interval": 1, "eval_interval": None})
    run_distributed(train, 1, start)
    return tmp_path, run_distributed(train, 1, run(tmp_path, "reference"))[0]


@pytest.mark.parametrize("split", SPLITS)
def test_loss_and_gradient_norm_do_not_depend_on_the_split(reference: tuple[Path, Ran], split: str) -> None:
    tmp_path, expected = reference
    world_size, options = SPLITS[split]
    result = run_distributed(train, world_size, run(tmp_path, split, **options))[0]
    assert losses(result.lines) == pytest.approx(losses(expected.lines), rel=1e-5)
    norms, expected_norms = ([line["grad_norm"] for line in ran.lines if "loss" in line] for ran in (result, expected))
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert result.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
