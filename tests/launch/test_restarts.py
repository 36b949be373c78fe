"""Workers that die are started again from the last checkpoint, as long as that leads anywhere."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ConfigError
from bridge.launch import spawn, world
from bridge.runs.claim import Claim
from bridge.runs.result import Result
from bridge.training.metrics import read
from tests.distributed import run_distributed
from tests.launch.commands import TINY, train
from tests.training.runs import config

pytestmark = pytest.mark.usefixtures("warm_processes")
DYING_SOURCE = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from bridge.data import mock
from bridge.data.mock import Config, prepare

def build(config, prepared, *, seed):
    datasets = mock.build(config, prepared, seed=seed)
    return datasets._replace(train=Dying(config, num_samples=1000, seed=(seed, 0)))

class Dying(mock.RandomTokens):
    read = 0

    def __getitem__(self, index):
        self.read += 1
        if os.environ.get("RANK") == "1" and self.read == 11 and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)
"""


def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """Rank 1 dies in step 6 (two samples each); the run was saved at step 4."""
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "dying.py").write_text(DYING_SOURCE)
    arguments = (*TINY, "train.steps=8", "train.num_devices=2", "checkpoint.save_interval=4", "name=a")
    code, out, err = train(*arguments, "data.source=user_package.dying", "launch.max_restarts=3", cwd=tmp_path)
    run_dir = tmp_path / "runs" / "a"
    assert code == 0, err
    assert err == "restart 1 of 3 from step 4: rank 1 was killed by SIGKILL, probably out of memory\n"
    assert err in (run_dir / "logs" / "launcher.log").read_text()
    assert "at step 4" in out
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["step"], result["restarts"], result["error"]) == ("done", 8, 1, None)
    assert [line["step"] for line in read(run_dir) if "loss" in line] == list(range(1, 9))


def ran(run_dir: Path, endings: list[tuple[Result, int | None]], monkeypatch: Any, *, stopping: bool = False) -> Result:
    """`run_workers` with up to 5 restarts, the workers ending as told: (result, step of the latest checkpoint)."""
    (run_dir / "logs").mkdir()
    (run_dir / "checkpoints").mkdir()
    told = [{"result": asdict(result), "step": step, "stopping": stopping} for result, step in endings]
    (run_dir / "endings.json").write_text(json.dumps(told))
    monkeypatch.setattr(spawn, "WORKER", "tests.launch.ending")
    return spawn.run_workers(
        Claim(run_dir, os.open(run_dir, os.O_RDONLY), None), num_devices=1, fields={}, max_restarts=5
    )


FAILED, DONE = Result("failed", error="x"), Result("done", 9, 1.0)


@pytest.mark.parametrize(
    ("endings", "last", "said"),
    [
        ([(FAILED, None), (DONE, 9)], replace(DONE, restarts=1), "restart 1 of 5 from the start: x"),
        ([(FAILED, 3)] * 3, replace(FAILED, restarts=2), "no restart 3: the last 2 brought no newer checkpoint"),
        ([(FAILED, step) for step in (3, 3, 4, 4, 5, 5)], replace(FAILED, restarts=5), "restart 5 of 5 from step 5: x"),
        ([(replace(FAILED, repeats=True), 3)], replace(FAILED, repeats=True), ""),
        ([(Result("invalid", error="x"), None)], Result("invalid", error="x"), ""),
        ([(Result("stopped", 3), 3)], Result("stopped", 3), ""),
    ],
)
def test_restarts_end_when_they_lead_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    endings: list[tuple[Result, int | None]],
    last: Result,
    said: str,
) -> None:
    assert ran(tmp_path, endings, monkeypatch) == last
    assert json.loads((tmp_path / "endings.json").read_text()) == []
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1:] == ([said] if said else [])


def test_a_run_that_was_asked_to_stop_is_not_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(tmp_path, [(FAILED, 3)], monkeypatch, stopping=True) == FAILED


def execute_after_an_hour(run: Any) -> Result:
    from bridge.launch import worker

    os.environ[worker.STARTED] = str(time.time() - 3600)
    return worker.execute(run, rank=0)


def test_the_time_limit_counts_from_before_a_restart(tmp_path: Path) -> None:
    run = config(tmp_path, train={"exit_after": "30m", "eval_interval": None})
    (result,) = run_distributed(execute_after_an_hour, 1, run, fresh=True)
    assert (result.status, result.step) == ("stopped", 1)


def test_torchruns_workers_are_restarted_by_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^launch.max_restarts: 2 is for .*; use `torchrun --max-restarts=2`$"):
        world.check_world(config(tmp_path, launch={"max_restarts": 2}))
