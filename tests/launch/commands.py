"""Runs the real command lines in a directory of their own, on a model small enough to start in seconds."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.vocab_size=64",
    "data=mock",
    "data.vocab_size=64",
    "data.sequence_length=16",
    "scheduler.lr_warmup_steps=0",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_samples=4",
    "log.log_interval=1",
)
USER_SOURCE = """
import os, time
from dataclasses import dataclass
from bridge.data import mock
from bridge.data.mock import prepare

@dataclass(frozen=True)
class Config(mock.Config):
    crash_on_rank: int | None = None
    seconds: float = 0.0  # per sample
    slow_until: str = ""  # a file; once it is there, samples come at once

def build(config, prepared, *, seed):
    print("rank", os.environ.get("RANK"), "is local rank", os.environ.get("LOCAL_RANK"), flush=True)
    if config.crash_on_rank == int(os.environ.get("RANK", "0")):
        raise RuntimeError("the disk\\nis full")
    datasets = mock.build(config, prepared, seed=seed)
    return datasets._replace(train=Slow(config, num_samples=1000, seed=(seed, 0)))

class Slow(mock.RandomTokens):
    def __getitem__(self, index):
        if not os.path.exists(self.config.slow_until):
            if self.config.seconds > 1:
                print("a slow sample", flush=True)
            time.sleep(self.config.seconds)
        return super().__getitem__(index)
"""


def is_the_crash(err: str, log: Path) -> bool:
    """Whether stderr is the traceback of USER_SOURCE's error, nothing before it, then its cause and log in one line."""
    lines = err.splitlines()
    first, last = "Traceback (most recent call last):", f"RuntimeError: the disk is full (in {log})"
    return (lines[0], lines[-1]) == (first, last) and err.count("Traceback") == 1 and 'raise RuntimeError("the' in err


def write_user_source(directory: Path) -> str:
    """A data source of a user's own, in the directory where the commands run; the override that chooses it."""
    package = directory / "user_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "source.py").write_text(USER_SOURCE)
    return "data.source=user_package.source"


def start(*arguments: str, cwd: Path, launcher: tuple[str, ...] = (sys.executable,)) -> "subprocess.Popen[str]":
    """Start `python train.py ARGUMENTS` (or another launcher) in `cwd`."""
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    return subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(*arguments: str, cwd: Path, launcher: tuple[str, ...] = (sys.executable,)) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python train.py ARGUMENTS` in `cwd`."""
    process = start(*arguments, cwd=cwd, launcher=launcher)
    stdout, stderr = process.communicate(timeout=180)
    return process.returncode, stdout, stderr


def wait_for(text: str, file: Path, *, timeout: float = 90) -> None:
    """Wait until `file` contains `text`."""
    deadline = time.monotonic() + timeout
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, f"no '{text}' in {file}: {file.read_text() if file.exists() else 'no file'}"
        time.sleep(0.1)
