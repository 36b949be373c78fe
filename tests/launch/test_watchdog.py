"""A run that hangs ends by itself, with the stacks of all ranks in their logs and the one that is behind named."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from bridge.launch.watchdog import Patience, Stuck, described
from bridge.training import pulse as places
from tests.distributed import run_distributed
from tests.training.runs import config

SECONDS = 1000.0


def train_with_a_stuck_rank(run: Any) -> None:
    """Rank 1 never gets its 5th sample, of step 3; it ends first, and rank 0 loses its connection to it meanwhile."""
    from bridge.data import mock
    from bridge.launch import watchdog, worker

    rank, read, original = int(os.environ["RANK"]), 0, mock.RandomTokens.__getitem__
    watchdog.GRACE = 2.0 if rank == 1 else 4.0

    def never_returns(self: Any, index: int) -> Any:
        nonlocal read
        read += 1
        if rank == 1 and read == 5:
            time.sleep(SECONDS)
        return original(self, index)

    mock.RandomTokens.__getitem__ = never_returns  # type: ignore[method-assign]
    result = worker.execute(run, rank=rank)
    raise AssertionError(f"came back with {result}")


def test_a_rank_that_never_gets_its_data_is_named_and_all_stacks_are_kept(tmp_path: Path) -> None:
    run = config(tmp_path, train={"eval_interval": None}, launch={"hang_timeout": "5s"})
    (run.run_dir / "logs").mkdir(parents=True)
    with pytest.raises(AssertionError) as caught:
        run_distributed(train_with_a_stuck_rank, 2, run, timeout=60, fresh=True)
    _, rank_0, rank_1 = re.split(r"^--- rank \d, exit code 1$", str(caught.value), flags=re.MULTILINE)
    assert "never_returns" in rank_1 and "never_returns" not in rank_0
    assert "train_step" in rank_0 and "came back" not in rank_0 + rank_1
    result = json.loads((run.run_dir / "result.json").read_text())
    host = re.escape(os.uname().nodename)
    assert (result["status"], result["step"]) == ("failed", None)
    assert re.match(
        rf"no progress within launch.hang_timeout=5s: behind is rank 1 \({host}\): reading data, step 3; "
        rf"rank 0 \({host}\): reducing gradients and updating, step 3; stacks in {re.escape(str(run.run_dir))}/logs/",
        result["error"],
    )


@pytest.mark.parametrize(
    ("places", "world_size", "said"),
    [
        ({0: Stuck(7, 2, "forward and backward", "a")}, 1, "rank 0 (a): forward and backward, step 7"),
        (
            {rank: Stuck(7, 2, "forward and backward", "a") for rank in (0, 2, 3)},
            4,
            "behind is rank 1 does not answer; ranks 0, 2, 3 (a): forward and backward, step 7",
        ),
        (
            {rank: Stuck(8 if rank else 7, 2, "saving", f"host{rank % 2}") for rank in range(12)},
            12,
            "behind is rank 0 (host0): saving, step 7; "
            "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more (host0, host1): saving, step 8",
        ),
    ],
)
def test_ranks_that_are_behind_come_first(places: dict[int, Stuck], world_size: int, said: str) -> None:
    assert described(places, world_size=world_size) == said


class Clock:
    """The time that the product sees, which only a test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_first_steps_evaluations_and_saves_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pulse = places.Pulse()
    patience = Patience(pulse, 10.0)

    def late_after(seconds: int) -> bool:
        over = False
        for _ in range(seconds):
            clock.now += 1.0
            over = patience.over(lambda: False)
        return over

    assert not late_after(10000)  # tokenising, loading: before the loop there are no steps
    pulse.enter(places.STARTING, step=0)
    pulse.enter(places.COMPUTING, step=1)
    assert not late_after(99) and late_after(2)
    pulse.finish_step()
    pulse.enter(places.READING, step=2)
    assert not late_after(9)
    pulse.enter(places.COMPUTING)  # within a step, moving on is progress: no step is too large
    assert not late_after(9) and late_after(2)
    for phase in (places.EVALUATING, places.SAVING):
        pulse.finish_step()
        pulse.enter(phase)
        assert not late_after(99) and late_after(2)
        pulse.enter(places.REPORTING)
        assert not late_after(9) and late_after(2)
    pulse.leave()
    assert not late_after(10000)


@pytest.mark.parametrize(("another_gave_up", "stopped", "seconds"), [(False, 0, 10), (True, 0, 5), (False, 1000, 1011)])
def test_a_rank_gives_up_with_the_one_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, another_gave_up: bool, stopped: float, seconds: float
) -> None:
    """Else the first to leave would break its connections before it has written its stacks. stopped: seconds, at the
    start, in which the whole process stood still: its job was suspended."""
    clock = Clock(monkeypatch)
    pulse = places.Pulse()
    patience = Patience(pulse, 10.0)
    pulse.enter(places.STARTING, step=0)
    pulse.finish_step()
    pulse.enter(places.READING, step=2)
    clock.now = stopped
    while clock.now < 2000:
        clock.now += patience.interval
        if patience.over(lambda: another_gave_up):
            break
    assert seconds < clock.now <= seconds + 1
