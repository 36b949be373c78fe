"""One training process: `python -m bridge.launch.worker [RUN_DIR]`, started by the driver. Reads RUN_DIR/config.yaml.

Without RUN_DIR the driver tells it later (bridge.launch.early).
"""

from bridge.processes import die_with_parent

if __name__ == "__main__":
    # No run outlives its driver unseen. SIGKILL: saves are crash safe, and it also ends one that hangs in a collective.
    die_with_parent()

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.config import run_config
from bridge.config.run_config import RunConfig
from bridge.data import loader_server
from bridge.errors import BridgeError, RunError, Stopped
from bridge.launch import early, live_line, memory, watchdog
from bridge.platform.memory import is_out_of_memory
from bridge.processes import skip_last_collection
from bridge.runs import run_files
from bridge.runs.result import Result, unexpected, write_rank_error, write_result
from bridge.runs.run_files import rank_file
from bridge.training.pulse import Pulse

STARTED = "BRIDGE_STARTED"  # environment: the time.time() at which the run was started, before any restart


def main() -> None:
    """Entry of a process that the driver or torch elastic started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which `tether` blocks below a launcher
    run_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else early.run_dir()
    rank = int(os.environ.get("RANK", "0"))
    with kept_output(rank_file(run_dir, "log", rank=rank), on_console=rank == 0) as console:
        result = execute(run_config.read(run_dir / run_files.CONFIG), rank=rank, terminal=console)
    # A save is told by result.json: torch elastic would take any exit code but 0 for a failure. Without one the other
    # ranks, if they have not been asked to stop, must not wait for this one.
    leave(0 if result.status == "stopped" and result.step is not None else result.exit_code)


@contextmanager
def kept_output(path: Path, *, on_console: bool) -> Iterator[int | None]:
    """Append stdout and stderr, also of C code and child processes, to `path`; on_console: to the console too.

    Gives then the file descriptor of the console.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    target = _open_tee(path) if on_console else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    console = [os.dup(1), os.dup(2)]
    _point_output(target, target)
    try:
        yield console[0] if on_console else None
    finally:
        _point_output(*console)
        if on_console:
            _drain(target)
        for descriptor in (target, *console):
            os.close(descriptor)


def _open_tee(path: Path) -> int:
    """Write end of a pipe to `tee`: a process of its own, it also passes on the last words of a crashing worker."""
    # Ignores Ctrl-C and what Slurm sends to every process of a job: the worker still has a save to report.
    ignoring = "trap '' INT TERM USR1 USR2; exec tee -a \"$0\""
    tee = subprocess.Popen(["/bin/sh", "-c", ignoring, str(path)], stdin=subprocess.PIPE)
    assert tee.stdin is not None
    target = os.dup(tee.stdin.fileno())
    tee.stdin.close()
    return target


def _drain(pipe: int, *, timeout: float = 5.0) -> None:
    """Wait until the pipe has been read. (Waiting for tee's end would not do: helper processes hold the pipe open.)"""
    deadline = time.monotonic() + timeout
    while live_line.unread(pipe) and time.monotonic() < deadline:
        time.sleep(0.01)


def _point_output(stdout: int, stderr: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)


def execute(config: RunConfig, *, rank: int, terminal: int | None = None) -> Result:
    """Train as `config` says in this process. Rank 0 writes result.json, a failing rank logs/rank_N.error.

    A traceback goes into the log alone: of all ranks that fail in the end, the console is shown the first one's.
    terminal: file descriptor on which to show where the run is, should it be a terminal's.
    """
    since = time.time() - float(os.environ.get(STARTED, time.time()))
    started = time.monotonic() - since
    try:
        pulse = Pulse()
        with live_line.following(pulse, config, terminal=terminal), watchdog.watching(pulse, config, rank=rank):
            if config.data.get("num_workers"):
                loader_server.start()  # it imports while this process does
            from bridge.training.run import run  # imports torch

            memory.check(config)
            outcome = run(config, started=started, pulse=pulse)
        result = Result(outcome.status, outcome.step, outcome.eval_loss)
    except Stopped:
        result = Result("stopped")
    except BridgeError as error:
        result = Result("invalid", error=str(error))
    except RunError as error:
        result = Result("failed", error=str(error))
    except Exception as error:
        # A loss that is not finite comes out of the same samples and weights again.
        result = unexpected(error, repeats=isinstance(error, FloatingPointError))
        _log(result.traceback or "", rank_file(config.run_dir, "log", rank=rank))
        if is_out_of_memory(error):
            log = rank_file(config.run_dir, "log", rank=rank)
            result = Result("failed", error=f"{memory.explained(config)} (the traceback is in {log})")
    if result.error is not None:
        write_rank_error(result, config.run_dir, rank=rank)
    if rank == 0:
        write_result(result, config.run_dir)
    return result


def _log(text: str, path: Path) -> None:
    """Append `text` to the log after what has been printed so far, and show it on no console."""
    sys.stdout.flush()
    sys.stderr.flush()
    if stat.S_ISFIFO(os.fstat(1).st_mode):  # rank 0's, to the log and the console
        _drain(1)
    with path.open("a", encoding="utf-8") as log:
        log.write(text)


def leave(exit_code: int) -> None:
    """End the process. After a failure at once: leaving by the usual way can wait forever for a lost peer."""
    if exit_code in (0, 75):
        skip_last_collection()
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
