"""Ends a run that hangs: every rank writes the stacks of its threads into its log, then says which ranks are behind.

Each rank watches itself, whoever started it. No rank leaves before the others had GRACE seconds to do the same: the
first to leave breaks the connections that the others wait on.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bridge.config.run_config import RunConfig
from bridge.files import write_json
from bridge.runs import run_files
from bridge.runs.result import EXIT_CODES, Result, write_rank_error, write_result
from bridge.runs.run_files import rank_file, rank_files

if TYPE_CHECKING:
    from bridge.training.pulse import Pulse

# The first step of a process, an evaluation's step and a save may each take this many times the phase of a step.
ALLOWANCE = 10
GRACE = 5.0  # seconds, for a shared file system to show a rank's file and for the others to follow
LAST_WORDS = 60.0  # seconds after which a process leaves without them: the disk is what hangs
MOST_NAMED = 8


class Stuck(NamedTuple):
    """Where a rank was when it gave up. order: the further a rank has come in the step, the larger."""

    step: int
    order: int
    phase: str
    host: str


@contextmanager
def watching(pulse: "Pulse", config: RunConfig, *, rank: int) -> Iterator[None]:
    """While the body runs, end this process when `pulse` stands still for launch.hang_timeout."""
    if config.launch.hang_seconds is None:
        yield
        return
    done, ending = threading.Event(), threading.Event()
    thread = threading.Thread(target=_watch, args=(pulse, config, rank, done, ending), daemon=True, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        # What is raised by now is that a peer has ended already: the watchdog's account is the cause.
        if ending.is_set():
            thread.join()
        done.set()


def _watch(pulse: "Pulse", config: RunConfig, rank: int, done: threading.Event, ending: threading.Event) -> None:
    timeout = config.launch.hang_seconds
    assert timeout is not None
    patience = Patience(pulse, timeout)
    while not done.wait(patience.interval):
        if patience.over(lambda: bool(_places(config.run_dir))):
            ending.set()
            telling = threading.Thread(target=_tell, args=(pulse, config, rank), daemon=True)
            telling.start()
            telling.join(GRACE + LAST_WORDS)
            os._exit(EXIT_CODES["failed"])


class Patience:
    """How long `pulse` may stand still, `timeout` seconds in a phase of a step. Asked every `interval` seconds."""

    def __init__(self, pulse: "Pulse", timeout: float) -> None:
        self.interval = min(1.0, timeout / 10)
        self._pulse, self._timeout = pulse, timeout
        self._looked, self._resumed = time.monotonic(), 0.0

    def over(self, another_gave_up: Callable[[], bool]) -> bool:
        """Whether this rank gives up: earlier when another has, as those that wait for it began to a little later."""
        # A process that was stopped (SIGSTOP, a suspended job) begins anew.
        self._looked, before = time.monotonic(), self._looked
        if self._looked - before > 1.0 + self._timeout / 10:
            self._resumed = self._looked
        waited = self._share_waited()
        return waited > 1 or (waited > 0.5 and another_gave_up())

    def _share_waited(self) -> float:
        """How much of the time that a phase of a step may take is over; 1 is all of it."""
        from bridge.training.pulse import WORK_BETWEEN_STEPS

        since = self._pulse.busy_since
        slow = self._pulse.finished_steps == 0 or self._pulse.place.phase in WORK_BETWEEN_STEPS
        allowed = self._timeout * (ALLOWANCE if slow else 1)
        return 0.0 if since is None else (self._looked - max(since, self._resumed)) / allowed


def _tell(pulse: "Pulse", config: RunConfig, rank: int) -> None:
    """Stacks into the log, then after GRACE seconds which ranks are behind: into the log and the error files."""
    from bridge.training.pulse import PHASES

    step, phase, _ = pulse.place
    print(f"no progress: rank {rank} is {phase}, step {step}. The stacks of its threads:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    stuck = Stuck(step, PHASES.index(phase), phase, os.uname().nodename)
    write_json(stuck, rank_file(config.run_dir, "hang", rank=rank))
    time.sleep(GRACE)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    found = described(_places(config.run_dir), world_size=world_size)
    error = f"no progress within launch.hang_timeout={config.launch.hang_timeout}: {found}"
    result = Result("failed", error=f"{error}; stacks in {config.run_dir / run_files.LOGS}/rank_N.log")
    write_rank_error(result, config.run_dir, rank=rank)
    if rank == 0:
        write_result(result, config.run_dir)
    print(result.error, file=sys.stderr, flush=True)


def described(places: Mapping[int, Stuck], *, world_size: int) -> str:
    """Where the ranks are, those behind first: they keep the others waiting."""
    groups: dict[tuple[int, int], list[int]] = {}
    for rank, place in sorted(places.items()):
        groups.setdefault(place[:2], []).append(rank)
    told = []
    if silent := sorted(set(range(world_size)) - places.keys()):
        told.append(f"{_named(silent)} {'does' if len(silent) == 1 else 'do'} not answer")
    for _, ranks in sorted(groups.items()):
        first = places[ranks[0]]
        hosts = ", ".join(sorted({places[rank].host for rank in ranks})[:MOST_NAMED])
        told.append(f"{_named(ranks)} ({hosts}): {first.phase}, step {first.step}")
    return ("behind is " if len(told) > 1 else "") + "; ".join(told)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:MOST_NAMED])
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def _places(run_dir: Path) -> dict[int, Stuck]:
    return {rank: Stuck(*json.loads(file.read_text())) for rank, file in rank_files(run_dir, "hang")}
