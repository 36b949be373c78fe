"""kill -9 in the middle of a save: the run resumes from the last whole checkpoint and ends as if undisturbed."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.runs import config, losses, train

# Where the process dies during the save of step 8 (the second save). What the resumed run must start from.
POINTS = {
    "before_the_weights": 4,
    "between_weights_and_metadata": 4,
    "before_the_rename": 4,
    "before_latest": 4,
    "before_retention": 8,
    "during_retention": 8,
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_renaming_once_there_is(directory: Path) -> None:
    """Be killed before the first rename of anything after `directory` has appeared."""

    def watch(event: str, _: object) -> None:
        if event == "os.rename" and directory.is_dir():
            die()

    sys.addaudithook(watch)


def train_and_die(run: Any, point: str) -> None:
    """Train; at the second save, at `point`, be killed as by the kernel: no handler, no cleanup."""
    from bridge.checkpoint import files, writing
    from bridge.training.run import run as train_here

    calls = 0

    def dying(original: Any, *, before: bool = True, at: int = 2) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at and before:
                die()
            result = original(*args, **kwargs)
            if calls == at:
                die()
            return result

        return wrapper

    if point == "before_the_weights":
        writing.dist_checkpointing.save = dying(writing.dist_checkpointing.save)
    elif point == "between_weights_and_metadata":
        writing.save_config = dying(writing.save_config)
    elif point == "before_the_rename":
        files.publish = dying(files.publish)
    elif point == "before_latest":
        die_renaming_once_there_is(run.run_dir / "checkpoints" / "iter_0000008")
    elif point == "before_retention":
        files.publish = dying(files.publish, before=False)
    elif point == "during_retention":
        files.shutil.rmtree = dying(files.shutil.rmtree, at=1)
    train_here(run)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = config(tmp_path_factory.mktemp("straight"), train={"steps": 12, "eval_interval": None})
    return losses(run_distributed(train, 1, run)[0].lines)


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_saving(tmp_path: Path, straight: list[float], point: str) -> None:
    options: dict[str, Any] = {
        "train": {"steps": 12, "eval_interval": None},
        "checkpoint": {"save_interval": 4, "keep_last": 1},
    }
    run = config(tmp_path, **options)
    with pytest.raises(AssertionError, match="exit code -9"):
        run_distributed(train_and_die, 1, run, point, fresh=True)
    root = run.run_dir / "checkpoints"
    assert (root / "latest_checkpointed_iteration.txt").read_text() == str(POINTS[point])

    resumed = run_distributed(train, 1, run)[0]
    assert (resumed.status, resumed.step) == ("done", 12)
    assert losses(resumed.lines) == straight
    left = sorted(path.name for path in root.iterdir())
    assert left == ["hf", "iter_0000012", "latest_checkpointed_iteration.txt", "model.yaml"]
