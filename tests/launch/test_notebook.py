"""`bridge.compose` and `bridge.train`, called as from a notebook: an event loop is running, sys.stdout is not fd 1."""

import asyncio
import contextlib
import io
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import bridge
from bridge.errors import ConfigError, RunError
from bridge.launch import notebook
from bridge.runs.claim import latest_step
from tests.launch.commands import TINY, write_user_source

pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def test_compose(tmp_path: Path):
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "quick.yaml").write_text("# @package _global_\ntrain:\n  steps: 7\n")
    typed = list(sys.argv)
    config = bridge.compose(overrides=["recipe=quick", "model.num_layers=3", "name=x"], config_dir="mine")
    assert (config.train.steps, config.model["num_layers"], config.run_dir) == (7, 3, tmp_path / "runs" / "x")
    assert sys.argv == typed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stpes=3"], "^train.stpes: no such key .*did you mean 'train.steps'"),
        (["-m", "optimizer.lr=1,2"], "^overrides: '-m' is a flag; run sweeps .*`python train.py -m ...` in a shell"),
        (
            ["hydra.mode=MULTIRUN", "optimizer.lr=1e-3,1e-4"],
            "^overrides: a sweep of 2 jobs; run it as `python",
        ),
    ],
)
def test_mistakes(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        bridge.compose(overrides)


def test_train_and_the_same_call_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Under an event loop in a thread, where signal handlers cannot be set."""

    async def cell() -> list[notebook.Outcome]:
        return [bridge.train([*TINY, "train.steps=2", "name=a"]) for _ in range(2)]

    outcomes: list[notebook.Outcome] = []
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        thread = threading.Thread(target=lambda: outcomes.extend(asyncio.run(cell())))
        thread.start()
        thread.join()
    first, second = outcomes
    assert (first.status, first.step, first.run_dir) == ("done", 2, tmp_path / "runs" / "a")
    assert first.eval_loss is not None and second == first
    assert "loss" in first.metrics.read_text()
    text = shown.getvalue()
    assert "step 2/2" in text and "nothing left to do" in text
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ConfigError, match="^model.num_layers: .*holds checkpoints of another configuration"):
        bridge.train([*TINY, "train.steps=2", "name=a", "model.num_layers=2"])


def test_a_run_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_user_source(tmp_path)
    with pytest.raises(RunError, match=r"^RuntimeError: the disk is full \(in .*rank_0.log\)"):
        bridge.train([*TINY, source, "data.crash_on_rank=0", "name=b"])
    out, _ = capsys.readouterr()
    assert out.count("Traceback") == 1


def test_the_stop_button_saves(tmp_path: Path):
    source = write_user_source(tmp_path)
    run_dir = tmp_path / "runs" / "c"
    caller = threading.main_thread().ident
    assert caller is not None

    def press() -> None:
        while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
            time.sleep(0.05)
        signal.pthread_kill(caller, signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    outcome = bridge.train([*TINY, source, "data.seconds=0.05", "train.steps=1000", "name=c"])
    assert outcome.status == "stopped"
    assert outcome.step == latest_step(run_dir)
