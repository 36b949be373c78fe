"""The worker processes of one run: their environment, their signals, and what became of them."""

import os
import signal
import site
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

import bridge
from bridge.launch.result import Result, first_rank_error, read_result, write_result
from bridge.launch.run_dir import Claim
from bridge.platform.processes import die_with_parent

WORKER = "bridge.launch.worker"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_workers(claim: Claim, *, num_devices: int, fields: Mapping[str, Any]) -> Result:
    """Run one worker per device on claim.path until all have ended. fields: TransformerConfig fields that are set."""
    entry = ["-m", WORKER, str(claim.path)]
    environment = worker_environment(num_devices=num_devices, fields=fields)
    logs = claim.path / "logs"
    if num_devices == 1:
        ended, stopping = _watch([sys.executable, *entry], environment, claim, stderr=None)
        last_resort = f"the worker {_described(ended)}; see {logs / 'rank_0.log'}"
    else:
        elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_devices}", *entry]
        # Torch elastic's own report of a failure goes to a file: the driver prints the cause in one line.
        with (logs / "launcher.log").open("ab") as launcher_log:
            _, stopping = _watch([sys.executable, *elastic], environment, claim, stderr=launcher_log)
        last_resort = f"a worker died without an error of its own; see {logs / 'launcher.log'}"
    result = first_rank_error(claim.path) or read_result(claim.path)
    if result is None:  # asked to stop before there was anything to save, or died in a way no process can report itself
        result = Result("stopped") if stopping else Result("failed", error=last_resort)
    write_result(result, claim.path)
    return result


def worker_environment(*, num_devices: int, fields: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the workers. What the user has set already stays."""
    defaults = {"OMP_NUM_THREADS": str(max(1, _num_cores() // num_devices)), "PYTHONUNBUFFERED": "1"}
    if any((fields.get(size) or 1) > 1 for size in ("tensor_model_parallel_size", "context_parallel_size")):
        # With one hardware queue, kernels start in the order they were issued, which mcore's overlap of TP and CP
        # communication with computation relies on. It is read when a process first touches the GPU: set it before.
        defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    environment = defaults | dict(os.environ)
    checkout = str(Path(bridge.__file__).parents[1])
    if checkout not in site.getsitepackages():  # `python DIR/train.py` finds the package by the script's directory
        paths = [checkout, *environment.get("PYTHONPATH", "").split(os.pathsep)]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _watch(command: list[str], environment: dict[str, str], claim: Claim, *, stderr: Any) -> tuple[int, bool]:
    """Run `command` to its end, passing stop signals on. Returns its exit code, and whether it was asked to stop."""
    with _forwarded_signals() as stop:
        process = subprocess.Popen(
            command,
            env=environment,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            pass_fds=[claim.lock_fd],
            start_new_session=True,  # Ctrl-C reaches the driver only, which asks the workers to save and stop
            preexec_fn=die_with_parent,
        )
        stop.child = process.pid
        if stop.asked:  # between the handlers' installation and now
            stop.forward()
        return process.wait(), stop.asked > 0


def _described(ended: int) -> str:
    return f"was killed by {signal.Signals(-ended).name}" if ended < 0 else f"left with exit code {ended}"


class _Stop:
    """The stop signals received so far, and the process to pass them on to."""

    def __init__(self) -> None:
        self.child: int | None = None
        self.asked = 0
        self.interrupts = 0

    def receive(self, signum: int, frame: FrameType | None) -> None:
        self.asked += 1
        self.interrupts += signum == signal.SIGINT
        if self.interrupts > 1:
            print("interrupted twice: ending the workers without a save", file=sys.stderr, flush=True)
            _kill_tree(self.child)
        else:
            if self.asked == 1:
                print(f"{signal.Signals(signum).name}: saving a checkpoint, then stopping", file=sys.stderr, flush=True)
            self.forward()

    def forward(self) -> None:
        """SIGTERM to the workers themselves: torch elastic, told to stop, kills them in the middle of a long save."""
        if self.child is None:
            return
        for process in _workers(self.child) or _tree(self.child)[:1]:
            _signal(process, signal.SIGTERM)


@contextmanager
def _forwarded_signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {signum: signal.signal(signum, stop.receive) for signum in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _workers(pid: int) -> list[psutil.Process]:
    """The workers' own processes: not torch elastic, nor forks of a worker, which load data or write checkpoints."""
    parents: dict[psutil.Process, int] = {}
    for process in _tree(pid):
        with suppress(psutil.Error):  # it has just ended
            command = process.cmdline()
            if ["-m", WORKER] in (command[1:3], command[2:4]):  # torch elastic starts `python -u -m ...`
                parents[process] = process.ppid()
    forking = {process.pid for process in parents}
    return [process for process, parent in parents.items() if parent not in forking]


def _tree(pid: int | None) -> list[psutil.Process]:
    """The process and all its descendants, itself first; empty when it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill_tree(pid: int | None) -> None:
    for process in _tree(pid):
        _signal(process, signal.SIGKILL)


def _signal(process: psutil.Process, signum: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signum)
