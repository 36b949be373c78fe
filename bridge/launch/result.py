"""What a run ended with: result.json of a run directory, the error files of failed ranks, and the exit codes."""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

EXIT_CODES = {"done": 0, "failed": 1, "invalid": 2, "stopped": 75}
"""done: all steps taken; failed: our or the machine's fault; invalid: wrong input; stopped: saved, resume later."""


@dataclass(frozen=True)
class Result:
    """How a run ended. eval_loss: the last evaluation's loss in nats per token, None without one. error: one line."""

    status: str
    step: int | None = None
    eval_loss: float | None = None
    error: str | None = None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]

    @property
    def objective(self) -> float:
        """What a sweep minimises: the evaluation loss, infinite where there is none (a NaN ends Optuna's sweep)."""
        loss = self.eval_loss if self.status == "done" else None
        return math.inf if loss is None or math.isnan(loss) else loss


def in_one_line(error: Exception) -> str:
    """The last line of the traceback of `error`."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def result_path(run_dir: Path) -> Path:
    return run_dir / "result.json"


def log_path(run_dir: Path, *, rank: int) -> Path:
    return run_dir / "logs" / f"rank_{rank}.log"


def write_json(content: object, path: Path) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_result(result: Result, run_dir: Path) -> None:
    """result.json; a loss that is not finite is written as null, which JSON can hold."""
    loss = result.eval_loss
    finite = replace(result, eval_loss=loss if loss is not None and math.isfinite(loss) else None)
    write_json(asdict(finite), result_path(run_dir))


def read_result(run_dir: Path) -> Result | None:
    """The result.json of `run_dir`, or None when no run got that far."""
    try:
        return Result(**json.loads(result_path(run_dir).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_rank_error(result: Result, run_dir: Path, *, rank: int, traceback: bool = True) -> None:
    """logs/rank_N.error: a rank's failure, whether its log has a traceback, and when it happened."""
    record = {"time": time.time(), "traceback": traceback, **asdict(result)}
    write_json(record, run_dir / "logs" / f"rank_{rank}.error")


def first_rank_error(run_dir: Path) -> Result | None:
    """The failure that came first: the other ranks' errors ("connection closed by peer") mostly follow from it."""
    files = sorted((run_dir / "logs").glob("rank_*.error"))
    if not files:
        return None
    failures = [(json.loads(file.read_text(encoding="utf-8")), file) for file in files]
    first, file = min(failures, key=lambda failure: failure[0].pop("time"))
    traceback = first.pop("traceback")
    result = Result(**first)
    if result.status == "invalid" or not traceback:
        return result
    return replace(result, error=f"{result.error} (full traceback in {file.with_suffix('.log')})")


def forget(run_dir: Path) -> None:
    """Remove what an earlier run in this directory ended with."""
    for file in [result_path(run_dir), *(run_dir / "logs").glob("rank_*.error")]:
        file.unlink(missing_ok=True)
