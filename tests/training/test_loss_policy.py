"""Steps that are left out: for a loss that is not finite, for a sudden one, and because they are listed."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.runs import EXPERTS, config, losses, sample_ids, train

STEPS = {"steps": 16, "eval_interval": None, "global_batch_size": 2}
BAD = 13  # after the ten steps before which nothing is called a spike


def bad(run: Any, factor: float, gradient: float = 1.0, *, first: int = BAD, micro_batches: int = 1) -> Any:
    """`run`; rank 1's loss, or the gradient it has from it, is `factor` or `gradient` times what it should be, in the
    step that is the `first` one of the process."""
    objective = {"name": "tests.training.bad_objective", "rank": 1, "first": first, "micro_batches": micro_batches}
    return dataclasses.replace(run, objective={**objective, "factor": factor, "gradient": gradient})


def run_with(directory: Path, name: str, **options: Any) -> Any:
    return config(directory, name=name, train={**STEPS, **options}, log={"sample_ids": True, "log_interval": 3})


def strict_lines(run: Any) -> list[dict[str, Any]]:
    """metrics.jsonl as a reader sees it that knows no NaN, but for the lines about saves."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (run.run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [line for line in lines if "saved_step" not in line]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[list[int]]]:
    """Losses and samples of a run told beforehand to leave step BAD out."""
    run = run_with(tmp_path_factory.mktemp("listed"), "listed", iterations_to_skip=[BAD])
    run_distributed(train, 2, run)
    lines = strict_lines(run)[:-1]
    assert lines[BAD - 1]["loss"] is None and lines[BAD - 1]["grad_norm"] is None
    assert [line["skipped"] for line in lines] == [0] * (BAD - 1) + [1] * 4
    assert [line["consumed_samples"] for line in lines] == list(range(2, 34, 2))
    assert lines[BAD]["lr"] == lines[BAD - 1]["lr"]  # the schedule waits
    return losses(lines), sample_ids(run.run_dir)


def test_a_listed_step_trains_on_nothing(tmp_path: Path, listed: Any) -> None:
    straight = run_with(tmp_path, "straight")
    lines = run_distributed(train, 2, straight)[0].lines
    assert losses(lines)[: BAD - 1] == listed[0][: BAD - 1] and losses(lines)[BAD:] != listed[0][BAD:]
    assert sample_ids(straight.run_dir) == listed[1]


@pytest.mark.parametrize(
    ("policy", "factor", "gradient", "counted"),
    [
        ({"nonfinite_loss": "skip"}, math.nan, 1.0, "nonfinite"),
        ({"nonfinite_loss": "skip"}, 1.0, math.inf, "nonfinite"),
        ({"spiking_loss": "skip", "loss_spike_factor": 3.0}, 10.0, 1.0, "spikes"),
    ],
)
def test_a_bad_step_is_left_out_on_all_ranks_as_if_it_had_been_listed(
    tmp_path: Path, listed: Any, policy: dict[str, Any], factor: float, gradient: float, counted: str
) -> None:
    run = run_with(tmp_path, "run", **policy)
    run_distributed(train, 2, bad(run, factor, gradient))
    lines = strict_lines(run)[:-1]
    assert losses(lines)[BAD:] == listed[0][BAD:] and sample_ids(run.run_dir) == listed[1]
    assert [line["skipped"] for line in lines] == [line[counted] for line in lines] == [0] * (BAD - 1) + [1] * 4
    assert {line["nonfinite"] + line["spikes"] for line in lines[BAD:]} == {1}


def test_stages_of_a_pipeline_leave_a_step_out_together(tmp_path: Path) -> None:
    """Only the last stage has a loss, and here experts: their router's bias is balanced before the update."""
    stages: dict[str, Any] = {
        "whole_model": EXPERTS,
        "parallelism": {"pipeline_model_parallel_size": 2},
    }
    known = config(tmp_path, name="known", train={**STEPS, "iterations_to_skip": [BAD]}, **stages)
    found = config(tmp_path, name="found", train={**STEPS, "nonfinite_loss": "skip"}, **stages)
    run_distributed(train, 2, known)
    run_distributed(train, 2, bad(found, math.nan, micro_batches=2))
    assert strict_lines(found)[BAD - 1]["nonfinite"] == 1
    assert losses(strict_lines(found)[BAD:]) == losses(strict_lines(known)[BAD:])


def test_a_loss_that_is_not_finite_goes_into_the_metrics_as_null_and_training_on(tmp_path: Path) -> None:
    run = run_with(tmp_path, "run", nonfinite_loss="continue")
    run_distributed(train, 2, bad(run, math.inf))
    lines = strict_lines(run)[:-1]
    assert lines[BAD - 1]["loss"] is None and len(lines) == 16
    assert [line["nonfinite"] for line in lines] == [0] * (BAD - 1) + [1] * 4
    assert {line["skipped"] for line in lines} == {0}


@pytest.mark.parametrize(("policy", "factor"), [({"spiking_loss": "error"}, 40.0), ({}, math.inf)])
def test_an_error_reports_the_steps_up_to_it_and_saves_nothing(tmp_path: Path, policy: Any, factor: float) -> None:
    run = run_with(tmp_path, "run", **policy)
    with pytest.raises(AssertionError, match=rf"FloatingPointError: step {BAD}: loss (is inf|.* is above 10 times)"):
        run_distributed(train, 2, bad(run, factor))
    assert [line["step"] for line in strict_lines(run)] == list(range(1, BAD + 1))
    assert not (run.run_dir / "checkpoints").exists()


def test_a_resumed_run_remembers_what_a_spike_is_measured_against(tmp_path: Path, listed: Any) -> None:
    policy = {"spiking_loss": "skip", "loss_spike_factor": 3.0}
    run_distributed(train, 2, run_with(tmp_path, "run", **policy, exit_interval=BAD - 1))
    run = run_with(tmp_path, "run", **policy)
    run_distributed(train, 2, bad(run, 10.0, first=1))
    assert losses(strict_lines(run)[:-1])[BAD:] == listed[0][BAD:]
