"""The worker processes of one run: their environment, their signals, and what became of them."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from bridge.launch import early, process_tree, tether
from bridge.launch.early import WORKER
from bridge.launch.environment import worker_environment
from bridge.launch.worker import STARTED
from bridge.processes import of_child
from bridge.runs.claim import Claim, latest_step
from bridge.runs.result import Result, first_rank_error, forget, killed, read_result, write_result
from bridge.runs.run_files import launcher_log

ELASTIC = "bridge.launch.elastic"
MOST_FRUITLESS = 2  # restarts in a row without a newer checkpoint


def run_workers(
    claim: Claim, *, num_devices: int, fields: Mapping[str, Any], max_restarts: int = 0, saves: bool = True
) -> Result:
    """Run one worker per device on claim.path until all have ended, and again after a failure up to `max_restarts`
    times. fields: TransformerConfig fields that are set. saves: what they do when asked to stop.

    Not again when the same would happen again, nor when two restarts in a row have brought no newer checkpoint.
    """
    environment = worker_environment(num_devices=num_devices, fields=fields) | {STARTED: str(time.time())}
    restarts = fruitless = 0
    while True:
        before = latest_step(claim.path)
        result, stopping = _run_once(claim, environment, num_devices=num_devices, before=before, saves=saves)
        result = replace(result, restarts=restarts)
        write_result(result, claim.path)
        if result.status != "failed" or result.repeats or stopping or restarts == max_restarts:
            return result
        after = latest_step(claim.path)
        fruitless = fruitless + 1 if restarts > 0 and after == before else 0
        if fruitless == MOST_FRUITLESS:
            _tell(claim, f"no restart {restarts + 1}: the last {fruitless} brought no newer checkpoint")
            return result
        restarts += 1
        place = "the start" if after is None else f"step {after}"
        _tell(claim, f"restart {restarts} of {max_restarts} from {place}: {result.error}")
        forget(claim.path)


def _run_once(
    claim: Claim, environment: dict[str, str], *, num_devices: int, before: int | None, saves: bool
) -> tuple[Result, bool]:
    """How all workers ended, and whether they were asked to stop."""
    entry = ["-m", WORKER, str(claim.path)]
    if num_devices == 1:
        ended, stopping = _watch([sys.executable, *entry], environment, claim, stderr=None, saves=saves)
        said = killed(0, -ended) if ended < 0 else f"the worker ended with exit code {ended}"
        last_resort = f"{said}; see {claim.path / 'logs' / 'rank_0.log'}"
    else:
        elastic = ["-m", ELASTIC, str(claim.path), "--standalone", f"--nproc-per-node={num_devices}", *entry]
        # Torch elastic's own report of a failure goes to a file: the driver prints the cause in one line.
        with launcher_log(claim.path).open("ab") as log:
            _, stopping = _watch([sys.executable, *elastic], environment, claim, stderr=log, saves=saves)
        last_resort = f"a worker died without an error of its own; see {launcher_log(claim.path)}"
    result = first_rank_error(claim.path) or read_result(claim.path)
    if result is None:  # asked to stop before there was anything to save, or died in a way no process can report itself
        result = _broken_off(claim, before=before) if stopping else Result("failed", error=last_resort)
    return result, stopping


def _broken_off(claim: Claim, *, before: int | None) -> Result:
    """What there is of a run whose workers were ended by a signal. before: the step of the latest checkpoint then."""
    after = latest_step(claim.path)
    if after == before:
        return Result("stopped")
    print(f"stopped; the checkpoint of step {after} is complete, the same command resumes", flush=True)
    return Result("stopped", step=after)


def _tell(claim: Claim, line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    with launcher_log(claim.path).open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def _watch(
    command: list[str], environment: dict[str, str], claim: Claim, *, stderr: Any, saves: bool
) -> tuple[int, bool]:
    """Run `command` to its end, passing stop signals on. Returns its exit code, and whether it was asked to stop."""
    if ELASTIC in command:
        early.end()
    with _forwarded_signals(saves=saves) as stop:
        process = early.told(claim, environment) or subprocess.Popen(
            command,
            env=of_child(environment),
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            pass_fds=[claim.lock_fd],
            start_new_session=True,  # Ctrl-C reaches the driver only, which asks the workers to save and stop
        )
        stop.child = process.pid
        if stop.first is not None:  # between the handlers' installation and now
            stop.forward(stop.first)
        return process.wait(), stop.first is not None


class _Stop:
    """The stop signals received so far, and the process to pass them on to."""

    def __init__(self, *, saves: bool) -> None:
        self.saves = saves
        self.child: int | None = None
        self.first: signal.Signals | None = None
        self.interrupts = 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        signum = signal.Signals(number)
        self.interrupts += signum == signal.SIGINT
        if self.interrupts > 1:
            print("SIGINT again: ending the workers at once", file=sys.stderr, flush=True)
            process_tree.kill_tree(self.child)
            return
        if self.first is None:
            self.first = signum
            if not tether.tied():
                print(tether.announcement(signum, saves=self.saves), file=sys.stderr, flush=True)
        self.forward(tether.told() or signum)

    def forward(self, signum: signal.Signals) -> None:
        """To the workers themselves: torch elastic, told to stop, kills them in the middle of a long save.

        To one that does not listen yet as SIGTERM, which ends it without a word.
        """
        if self.child is None:
            return
        workers = _workers(self.child)
        for process in workers:
            process_tree.send(process, signum if _catches(process, signal.SIGTERM) else signal.SIGTERM)
        if not workers:
            for process in process_tree.tree(self.child)[:1]:
                process_tree.send(process, signal.SIGTERM)


@contextmanager
def _forwarded_signals(*, saves: bool) -> Iterator[_Stop]:
    stop = _Stop(saves=saves)
    answered = [signum for signum in tether.STOP_SIGNALS if not (tether.tied() and signum == signal.SIGINT)]
    before = {signum: signal.signal(signum, stop.receive) for signum in answered}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _workers(pid: int) -> list[psutil.Process]:
    """The workers' own processes: not torch elastic, nor forks of a worker, which load data."""
    parents: dict[psutil.Process, int] = {}
    for process in process_tree.tree(pid):
        with suppress(psutil.Error):  # it has just ended
            if process_tree.runs(process, WORKER):
                parents[process] = process.ppid()
    forking = {process.pid for process in parents}
    return [process for process, parent in parents.items() if parent not in forking]


def _catches(process: psutil.Process, signum: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal, as Linux tells; False where that is not known."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signum - 1) & 1)
