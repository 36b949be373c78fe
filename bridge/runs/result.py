"""What a run ended with: result.json of a run directory, the error files of failed ranks, and the exit codes."""

import json
import math
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bridge.command_line import FULL_ERROR
from bridge.errors import BridgeError
from bridge.files import write_json
from bridge.runs import run_files
from bridge.runs.run_files import rank_file, rank_files

EXIT_CODES = {"done": 0, "submitted": 0, "failed": 1, "invalid": 2, "stopped": 75, "pending": 75}
"""done: all steps taken; submitted: left to Slurm, unfinished; failed: our or the machine's fault; invalid: wrong
input; stopped: saved, resume later; pending: not begun when its sweep was stopped."""


@dataclass(frozen=True)
class Result:
    """How a run ended. eval_loss: the last evaluation's loss in nats per token, None without one. error: one line.
    traceback: of an error that is not the user's, or with HYDRA_FULL_ERROR=1 of any. repeats: the same would happen
    again. restarts: how often its workers were started anew."""

    status: str
    step: int | None = None
    eval_loss: float | None = None
    error: str | None = None
    traceback: str | None = None
    repeats: bool = False
    restarts: int = 0

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]

    @property
    def objective(self) -> float | None:
        """What a sweep minimises: the evaluation loss; None when the run is not done or its loss is not finite."""
        loss = self.eval_loss if self.status == "done" else None
        return loss if loss is not None and math.isfinite(loss) else None


def invalid(error: BridgeError) -> Result:
    """The user's mistake in one line; with HYDRA_FULL_ERROR=1 after its traceback."""
    whole = "".join(traceback.format_exception(error)) if os.environ.get(FULL_ERROR) == "1" else None
    return Result("invalid", error=" ".join(str(error).splitlines()), traceback=whole)


def unexpected(error: Exception, *, repeats: bool = False) -> Result:
    """A failure by an error that is not the user's: the last line of its traceback as one line, and all of it."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    whole = "".join(traceback.format_exception(error))
    return Result("failed", error=line, traceback=whole, repeats=repeats)


def print_error(result: Result) -> None:
    """On stderr the traceback, if there is one, then the error in one line."""
    if result.error is not None:
        print(f"{result.traceback or ''}{result.error}", file=sys.stderr, flush=True)


def write_result(result: Result, run_dir: Path) -> None:
    """result.json; a loss that is not finite is written as null, which JSON can hold."""
    loss = result.eval_loss
    finite = replace(result, eval_loss=loss if loss is not None and math.isfinite(loss) else None)
    write_json(asdict(finite), run_dir / run_files.RESULT)


def read_result(run_dir: Path) -> Result | None:
    """The result.json of `run_dir`, or None when no run got that far."""
    try:
        return Result(**json.loads((run_dir / run_files.RESULT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_rank_error(result: Result, run_dir: Path, *, rank: int, at: float | None = None) -> None:
    """logs/rank_N.error: a rank's failure, and when it happened (None: now)."""
    record = {"time": time.time() if at is None else at, **asdict(result)}
    write_json(record, rank_file(run_dir, "error", rank=rank))


def killed(rank: int, signum: int) -> str:
    """What is said of a rank that a signal ended."""
    guess = ", probably out of memory" if signum == signal.SIGKILL else ""
    return f"rank {rank} was killed by {signal.Signals(signum).name}{guess}"


def first_rank_error(run_dir: Path) -> Result | None:
    """The failure that came first: the other ranks' errors ("connection closed by peer") mostly follow from it."""
    failures = [(json.loads(file.read_text(encoding="utf-8")), file) for _, file in rank_files(run_dir, "error")]
    if not failures:
        return None
    first, file = min(failures, key=lambda failure: failure[0].pop("time"))
    result = Result(**first)
    return replace(result, error=f"{result.error} (in {file.with_suffix('.log')})") if result.traceback else result


def forget(run_dir: Path) -> None:
    """Remove what an earlier run in this directory ended with."""
    of_ranks = [file for kind in ("error", "hang") for _, file in rank_files(run_dir, kind)]
    for file in [run_dir / run_files.RESULT, *of_ranks]:
        file.unlink(missing_ok=True)
