"""A suspicious loss is computed again: what megatron-core's rerun state machine finds, saves and remembers."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed import run_distributed
from tests.training.runs import EXPERTS, Ran, config, losses, train, train_and_print

STEPS = {"steps": 6, "eval_interval": None}


class Ended(NamedTuple):
    """How a run ended on one rank: what it returned, or the type and the text of what it raised."""

    ran: Ran | None
    error: str


def train_to_the_end(run: Any, host: str | None) -> Ended:
    """`host`: what this machine calls itself."""
    if host is not None:
        name = os.uname()
        os.uname = lambda: os.uname_result((name.sysname, host, *name[2:]))  # type: ignore[assignment, return-value]
    try:
        return Ended(train(run), "")
    except RuntimeError as error:
        return Ended(None, f"{type(error).__name__}: {error}")


def ended(
    run: Any, world_size: int = 1, *, faulty: tuple[int, int, int] | None = None, host: str | None = None
) -> list[Ended]:
    """`faulty`: a rank whose loss is NaN, from which computation of a step's gradients on, and how often."""
    if faulty is not None:
        keys = dict(zip(("rank", "first", "computations"), faulty, strict=True))
        objective = {"name": "tests.training.bad_objective", "micro_batches": 4 // world_size, "factor": math.nan}
        run = dataclasses.replace(run, objective=objective | keys)
    return run_distributed(train_to_the_end, world_size, run, host)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = config(tmp_path_factory.mktemp("straight"), train=STEPS, model={"hidden_dropout": 0.1})
    return losses(run_distributed(train, 2, run)[0].lines)


def dropping(directory: Path, **overrides: Any) -> Any:
    """The run of `straight`. Dropout: a step computed again draws the same numbers, or its loss differs."""
    return config(directory, train={**STEPS, **overrides.pop("train", {})}, model={"hidden_dropout": 0.1}, **overrides)


def test_a_fault_that_passes_ends_the_run_naming_the_rank_and_the_same_command_goes_on(
    tmp_path: Path, straight: list[float]
) -> None:
    run = dropping(tmp_path, rerun={"mode": "validate_results"})
    ranks = ended(run, 2, faulty=(1, 4, 1))
    found = "HardwareFault: step 4: loss is not finite on rank 1 .* a different result when repeated: a transient fault"
    assert [bool(re.match(found, rank.error)) for rank in ranks] == [True, True]
    assert (run.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"
    resumed = ended(run, 2)
    assert resumed[0].ran is not None and losses(resumed[0].ran.lines) == straight


def test_a_fault_that_is_no_error_is_computed_again_and_training_goes_on(tmp_path: Path, straight: list[float]) -> None:
    run = dropping(tmp_path, rerun={"mode": "validate_results"}, train={"nonfinite_loss": "continue"})
    ranks = ended(run, 2, faulty=(0, 3, 1))
    assert ranks[0].ran is not None and losses(ranks[0].ran.lines) == straight


def test_a_result_that_stays_is_taken_to_other_hardware(tmp_path: Path, straight: list[float]) -> None:
    run = dropping(tmp_path, rerun={"mode": "validate_results"})
    first = ended(run, 2, faulty=(1, 4, 2), host="here")
    assert {(rank.ran.status, rank.ran.step) for rank in first if rank.ran} == {("stopped", 3)} and len(first) == 2
    kept = json.loads((run.run_dir / "rerun_state.json").read_text())
    assert [rank["initial_result"] for rank in kept["ranks"]] == [None, "nan"]

    again = ended(run, 2, faulty=(1, 1, 1), host="here")  # nothing to learn on the same device
    assert {rank.ran.status for rank in again if rank.ran} == {"stopped"} and len(again) == 2

    elsewhere = ended(run, 2, host="there")  # there, the loss is a number
    assert re.match("HardwareFault: step 4: .*: a persistent fault of the device of the first run", elsewhere[1].error)
    resumed = ended(run, 2, host="there")
    assert resumed[0].ran is not None and losses(resumed[0].ran.lines) == straight


@pytest.mark.parametrize(
    ("kind", "first", "elsewhere"),
    [
        ("transient_error", "a transient fault of this device", None),
        ("persistent_error", "", "a persistent fault of the device of the first run"),
        ("correct_result", "", "not a fault of the hardware"),
    ],
)
def test_injected_faults_are_classified(tmp_path: Path, kind: str, first: str, elsewhere: str | None) -> None:
    injected = {"mode": "validate_results", "error_injection_rate": 1, "error_injection_type": kind}
    run = dropping(tmp_path, rerun=injected)
    (result,) = ended(run, host="here")
    assert first in result.error if first else result.ran is not None and result.ran.status == "stopped"
    assert (run.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "1"
    if elsewhere:
        (result,) = ended(run, host="there")
        assert elsewhere in result.error


def test_every_step_twice_trains_the_same_and_reports_how_much_differs(tmp_path: Path, straight: list[float]) -> None:
    run = dropping(tmp_path, rerun={"mode": "report_determinism_stats"})
    ran, printed = run_distributed(train_and_print, 2, run)[0]
    assert losses(ran.lines) == straight
    assert "every step computed twice: 12 samples, all identical" in printed  # 6 steps of 2 ranks


def test_a_router_counts_the_tokens_of_a_repeated_step_once(tmp_path: Path) -> None:
    """Its bias follows from the tokens that each forward pass adds up. The fault is in step 3 of 6."""
    model = EXPERTS
    straight = config(tmp_path, name="straight", whole_model=model, train=STEPS)
    options: dict[str, Any] = {"train": {**STEPS, "nonfinite_loss": "continue"}, "rerun": {"mode": "validate_results"}}
    expected = losses(run_distributed(train, 1, straight)[0].lines)
    (result,) = ended(config(tmp_path, name="faulty", whole_model=model, **options), faulty=(0, 3, 1))
    assert result.ran is not None and losses(result.ran.lines) == expected
