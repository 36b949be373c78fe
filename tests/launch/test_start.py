"""What a run imports before its first step, and the worker that imports it while the driver reads the command line."""

import atexit
import gc
import os
import sys
from pathlib import Path

import pytest

from bridge.command_line import guarded
from bridge.launch import early
from bridge.launch.environment import worker_environment
from bridge.launch.worker import leave
from bridge.processes import num_cores, skip_last_collection
from bridge.runs.claim import Claim
from tests.launch.commands import TINY, train

SOURCE = """
import atexit, sys
from bridge.data.mock import Config, build, prepare

UNUSED = ("wandb", "tensorboard", "torch._dynamo", "torch._inductor", "transformers", "datasets", "triton", "onnx")
worker = "torch" in sys.modules
atexit.register(lambda: worker and print("imported:", [name for name in UNUSED if name in sys.modules], sys.argv[1:]))
"""


def test_a_run_imports_nothing_that_it_does_not_use(tmp_path: Path):
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "counting.py").write_text(SOURCE)
    code, out, err = train(*TINY, "data.source=corpora.counting", "train.steps=1", "name=one", cwd=tmp_path)
    assert code == 0, err
    told = [] if num_cores() > 1 else [str(tmp_path / "runs" / "one")]  # an early worker has no arguments
    assert f"imported: [] {told}" in out


@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        ((), True),
        (("-m", "optimizer.lr=1,2", "--config-dir=mine", "train.num_devices=1"), True),
        (("--help",), False),
        (("--cfg", "job"), False),
        (("dry_run=true",), False),
        (("hydra/launcher=slurm",), False),
        (("train.num_devices=2",), False),
    ],
)
def test_a_worker_is_started_early_for_what_looks_like_a_run(
    arguments: tuple[str, ...], starts: bool, monkeypatch: pytest.MonkeyPatch
):
    started = []
    monkeypatch.setattr(early, "num_cores", lambda: 2)
    monkeypatch.setattr(early.subprocess, "Popen", lambda command, **_: started.append(command))
    early.start(arguments)
    early._waiting.clear()
    assert len(started) == starts


def test_a_worker_that_is_not_wanted_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(early, "num_cores", lambda: 2)
    claim = Claim(tmp_path, os.open(tmp_path / "lock", os.O_CREAT), None)
    usual = worker_environment(num_devices=1, fields={})
    early.start([])
    worker = early._waiting[0].process
    early.end()  # the command was refused
    assert worker.returncode is not None
    assert early.told(claim, usual) is None
    early.start([])
    worker = early._waiting[0].process
    assert early.told(claim, usual | {"OMP_NUM_THREADS": "7"}) is None  # torch has read it already
    assert worker.returncode is not None
    os.close(claim.lock_fd)


def test_a_worker_ends_with_its_driver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(early, "num_cores", lambda: 2)
    early.start([])
    waiting = early._waiting.pop()
    waiting.channel.close()
    assert waiting.process.wait(60) == 0


def test_a_process_that_ends_looks_for_no_garbage(monkeypatch: pytest.MonkeyPatch):
    """With torch imported that takes 0.6 s. What torch's compiler leaves needs its destructors."""
    at_exit: list[object] = []
    frozen: list[None] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(None))
    assert guarded(lambda: 0) == 0
    assert at_exit == [skip_last_collection]
    monkeypatch.setitem(sys.modules, "torch._inductor", sys)
    skip_last_collection()
    assert not frozen
    monkeypatch.delitem(sys.modules, "torch._inductor")
    with pytest.raises(SystemExit):
        leave(0)
    assert len(frozen) == 1
