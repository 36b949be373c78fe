"""kill -9 at fifty random moments, most of them inside a save: the run resumes each time and ends as if undisturbed."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.runs import config, losses, sample_ids, train

STEPS, KILLS, BATCH = 120, 25, 4
RUN: dict[str, Any] = {"train": {"steps": STEPS, "eval_interval": None}, "log": {"log_interval": 1, "sample_ids": True}}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[int]]:
    """Losses and sample ids of the run that nothing disturbs, and that saves only at its end."""
    run = config(tmp_path_factory.mktemp("straight"), **RUN)
    result = losses(run_distributed(train, 1, run)[0].lines)
    return result, sample_ids(run.run_dir)[0]


def train_under_fire(run: Any, save: int, delay: float) -> Any:
    """Train; another process kills this one `delay` seconds after the `save`-th new save began."""
    killer = os.fork()
    if killer:
        try:
            return train(run)
        finally:
            os.waitpid(killer, 0)
    trainer = os.getppid()
    try:
        ignored = seen = begun_saves(run)
        while os.getppid() == trainer and len(seen - ignored) < save:
            time.sleep(0.001)
            seen = seen | begun_saves(run)
        time.sleep(delay)
        os.kill(trainer, signal.SIGKILL)
    finally:
        os._exit(0)


def begun_saves(run: Any) -> set[tuple[str, int]]:
    """Name and birth of the unfinished iterations there are now."""
    found = set()
    for path in (run.run_dir / "checkpoints").glob(".saving_iter_*"):
        with suppress(FileNotFoundError):  # it got its name
            found.add((path.name, path.stat().st_ino))
    return found


def check_what_is_there(root: Path) -> int:
    """Every iteration with a name is whole. The step of the latest, 0 before the first."""
    from bridge.checkpoint import checksums
    from bridge.weights import pointer

    for directory in root.glob("iter_*"):
        recorded = checksums.read(directory)
        assert recorded.keys() == {path.name for path in directory.iterdir()} - {checksums.CHECKSUMS}
        assert checksums.size_faults(directory, recorded) + checksums.content_faults(directory, recorded) == []
    newest = pointer.read(root)
    assert newest is None or newest.is_dir()
    return 0 if newest is None else int(newest.name.removeprefix("iter_"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_killed_again_and_again(tmp_path: Path, straight: tuple[list[float], list[int]], asynchronous: bool) -> None:
    draw = random.Random(20 + asynchronous)
    saving = {"save_interval": 1, "keep_last": 2, "async_save": asynchronous}
    run = config(tmp_path, **RUN, checkpoint=saving)
    all_losses, all_ids = straight
    kills, begun = 0, []
    for attempt in range(KILLS):
        begun.append(check_what_is_there(run.run_dir / "checkpoints"))
        moment = (draw.choice((1, 2, 2, 3)), draw.uniform(0, 0.08))
        with pytest.raises(AssertionError, match="exit code -9\n"):
            run_distributed(train_under_fire, 1, run, *moment, fresh=True)
        kills += 1
        ids = sample_ids(run.run_dir)[0]
        (run.run_dir / "sample_ids").rename(tmp_path / f"sample_ids_{attempt}")
        assert ids == all_ids[BATCH * begun[-1] :][: len(ids)], f"attempt {attempt} from step {begun[-1]}"
    last = run_distributed(train, 1, config(tmp_path, **RUN))[0]
    assert (last.status, last.step) == ("done", STEPS)
    assert losses(last.lines) == all_losses
    assert kills == KILLS and begun == sorted(begun) and len(set(begun)) > KILLS / 3, begun
