"""What runs inside a submitted job: one rank per task, and what a job does about the signals of its cluster."""

import atexit
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bridge.config import run_config
from bridge.files import read_yaml
from bridge.launch import ranks, torchrun
from bridge.launch.ranks import RunToStart
from bridge.launch.worker import leave
from bridge.runs import run_files
from bridge.runs.result import EXIT_CODES


@dataclass(frozen=True)
class RunJob:
    """One rank of the run whose directory was prepared when the job was submitted; submitit calls it in every task."""

    run_dir: str

    def __call__(self) -> None:
        """Train; leaves by SystemExit, also of a task that is done: Slurm then knows how every rank ended."""
        ranks.adopt()
        with stopping_on_usr2() as requeue:
            exit_code = ranks.run(self._prepared)
            if exit_code == EXIT_CODES["stopped"]:
                requeue()
        leave(exit_code)

    def checkpoint(self) -> Any:
        """What submitit runs after a requeue: the same, which finds the checkpoint in the run directory."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _prepared(self) -> RunToStart:
        folder = Path(self.run_dir)
        overrides = read_yaml(folder / run_files.OVERRIDES)
        return RunToStart(run_config.read(folder / run_files.CONFIG), overrides)


@contextmanager
def stopping_on_usr2() -> Iterator[Callable[[], None]]:
    """Inside, SIGUSR2, by which Slurm announces the time limit, stops a run as SIGTERM does: save, then leave.

    Yields a function to call when the run has stopped: if SIGUSR2 asked for it, it hands over to the handler that was
    there before, submitit's, which puts the job back into the queue. Before there is a run to stop, rank 0 calls that
    handler at once: nothing is lost then. After a plain SIGTERM Slurm itself knows whether to requeue (preemption) or
    not (scancel).
    """
    owner = os.getpid()
    before, idle = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)
    asked = False

    def receive(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if os.getpid() != owner:  # a forked helper process: Slurm signals those, too
            return
        asked = True
        if signal.getsignal(signal.SIGTERM) != idle:
            signal.raise_signal(signal.SIGTERM)
        elif torchrun.rank() == 0:
            requeue()
            sys.exit(EXIT_CODES["stopped"])

    def requeue() -> None:
        if asked and callable(before):
            try:
                before(signal.SIGUSR2, None)
            except SystemExit:
                pass
            except Exception as error:  # submitit: no retries left
                print(error, file=sys.stderr, flush=True)

    signal.signal(signal.SIGUSR2, receive)
    try:
        yield requeue
    finally:
        signal.signal(signal.SIGUSR2, before)


def this_process() -> tuple[str, int]:
    """What tells a process of a job from the driver, when both run the same function."""
    return socket.gethostname(), os.getpid()


def end_with(exit_code: int) -> None:
    """Make this process, if submitit started it, leave with `exit_code` once the pickle is written.

    submitit's stock launchers take whatever was pickled for a success, and so does Slurm: an exit code it believes.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    if exit_code == EXIT_CODES["stopped"]:
        sys.exit(exit_code if torchrun.rank() == 0 else 0)
    if exit_code:
        atexit.register(_leave, exit_code)


def _leave(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
