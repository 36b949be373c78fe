"""What the files of run directories tell: which runs there are, what state each is in, how far it got.

Only reads, and expects any file to be missing, half written, damaged or in use. Costs no torch.
"""

import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bridge.errors import ConfigError
from bridge.runs import run_files, slurm_states
from bridge.runs.result import EXIT_CODES
from bridge.runs.run_files import rank_file, rank_files

ENDED = frozenset({"done", "stopped", "failed", "invalid", "died"})
"""States of a run that no process works on; the others are running and pending."""

# A run directory has one of these; what lies below it in run_files.DIRECTORIES belongs to it and holds no other run.
MARKS = frozenset({run_files.OVERRIDES, run_files.RESULT, run_files.METRICS, run_files.LOCK, run_files.SLURM_JOB})
MAX_STEP = 2**53  # more is damage, and no number to JavaScript
TAIL_BYTES = 64 * 1024  # some hundred lines of metrics.jsonl

# In config.yaml as run_config.write makes it. Reading its hundred lines as YAML would take 20 ms a run.
_LENGTH = re.compile(r"^train:\n(?:  .*\n)*?  (steps|epochs): (\d+)$", re.MULTILINE)


class Run(NamedTuple):
    """One run directory. None: not known."""

    path: Path
    name: str  # path relative to the directory that was searched
    state: str  # running, pending, done, stopped (resumable), failed, invalid, died (no process, no result)
    where: str | None = None  # who works on it: "process 12 on host", "Slurm job 7"
    step: int | None = None
    steps: int | None = None  # train.steps, or by the last reported step those of train.epochs
    loss: float | None = None  # of the last reported step, nats per token; may be NaN
    eval_loss: float | None = None  # of the last evaluation; may be NaN
    tokens_per_second: float | None = None
    age: float | None = None  # seconds since the last line of metrics.jsonl
    error: str | None = None  # one line
    slurm_job: str | None = None
    eta: float | None = None  # of a running one: seconds of the steps left, without evaluations and saves


def find(directory: Path) -> list[Run]:
    """The runs at and below `directory`, jobs that a sweep.json announces included, sorted by name.

    Raises ConfigError when it is not a directory.
    """
    if not directory.is_dir():
        kind = "is a file" if directory.exists() else "no such directory"
        raise ConfigError(f"{directory}: {kind}; give a directory of runs, such as runs/ or runs/sweeps/NAME")
    found: dict[Path, Run] = {}
    announced: dict[Path, Run] = {}
    for path, below, files in os.walk(directory):
        folder = Path(path)
        if not MARKS.isdisjoint(files):
            found[folder] = read(folder, name=_relative(folder, directory))
            below[:] = [name for name in below if name not in run_files.DIRECTORIES]
        for row in sweep_rows(folder) if run_files.SWEEP in files else ():
            job = folder / str(row.get("directory") or Path(str(row.get("run_dir") or row.get("job"))).name)
            announced[job] = _announced(row, job, name=_relative(job, directory))
    return sorted(_asked_slurm((announced | found).values()), key=lambda run: natural(run.name))


def read(path: Path, *, name: str) -> Run:
    """The run directory `path`."""
    holder, ended = _holder(path), _result(path)
    if holder is None and not ended:  # it may have begun, or ended, between the two looks
        holder, ended = _holder(path), _result(path)
    last = _last_lines(path)
    state = "running" if holder else ended.get("status") or ("died" if _has_begun(path) else "pending")
    step = ended.get("step") if not holder else None
    if not isinstance(step, int):
        step = last.get("step")
    error = ended.get("error") if not holder else None
    if state == "died":
        error = _last_words(path)
    job, steps, seconds = _json(path / run_files.SLURM_JOB), _steps(path, last), _age(path / run_files.METRICS)
    return Run(
        path=path,
        name=name,
        state=state,
        where=holder,
        step=step,
        steps=steps,
        loss=number(last.get("loss")),
        eval_loss=number(last.get("eval_loss", ended.get("eval_loss"))),  # eval_only writes no metrics
        tokens_per_second=number(last.get("tokens_per_second")),
        age=seconds,
        error=None if error is None else one_line(str(error)),
        slurm_job=str(job["slurm_job_id"]) if job.get("slurm_job_id") else None,
        eta=_left(last, step, steps, age=seconds or 0.0) if holder else None,
    )


def metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a run's metrics.jsonl that has a step."""
    try:
        with (path / run_files.METRICS).open(encoding="utf-8", errors="replace") as file:
            yield from _objects(file)
    except OSError:
        return


def overrides(path: Path) -> list[str]:
    """The overrides a run was started with."""
    try:
        loaded = yaml.safe_load((path / run_files.OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []
    return [str(item) for item in loaded] if isinstance(loaded, list) else []


def sweep_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a directory's sweep.json; none without one."""
    loaded = _json_value(directory / run_files.SWEEP)
    return [row for row in loaded if isinstance(row, dict)] if isinstance(loaded, list) else []


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: an error may quote anything."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


def number(value: Any) -> float | None:
    """`value` when it is a number, NaN and infinity included."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # an integer of 400 digits
        return None


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key: job 2 before job 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _relative(path: Path, directory: Path) -> str:
    relative = str(path.relative_to(directory))
    return path.resolve().name if relative == "." else relative


def _announced(row: Mapping[str, Any], path: Path, *, name: str) -> Run:
    """A job that has no files of its own: not started yet, or refused before it could begin."""
    status, error = row.get("status"), row.get("error")
    return Run(
        path=path,
        name=name,
        state=str(status) if status in ENDED else "pending",
        error=None if error is None else one_line(str(error)),
        slurm_job=str(row["slurm_job_id"]) if row.get("slurm_job_id") else None,
    )


def _holder(path: Path) -> str | None:
    """Who holds the run directory's lock; None when nobody does.

    The question takes a shared lock for an instant; a run that starts in it tries again (run_dir.py).
    """
    try:
        descriptor = os.open(path / run_files.LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return one_line(os.read(descriptor, 200).decode(errors="replace")) or "another process"
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def _result(path: Path) -> dict[str, Any]:
    ended = _json(path / run_files.RESULT)
    return ended if ended.get("status") in EXIT_CODES else {}


def _has_begun(path: Path) -> bool:
    """Whether a worker has left a trace; a sweep's driver prepares the directories before it submits the jobs."""
    return (path / run_files.METRICS).exists() or any((path / run_files.LOGS).glob("*"))


def _last_words(path: Path) -> str:
    """Why a run has no result, as far as its files say."""
    failures = [(_json(file), file) for _, file in rank_files(path, "error")]
    known = [failure for failure, _ in failures if failure.get("error")]
    if known:
        return str(min(known, key=lambda failure: number(failure.get("time")) or math.inf)["error"])
    lines = [line for line in _tail(rank_file(path, "log", rank=0)).splitlines() if line.strip()]
    return f"ended without a result; last line of its log: {lines[-1].strip()}" if lines else "ended without a result"


def _last_lines(path: Path) -> dict[str, Any]:
    """The newest value of each key near the end of metrics.jsonl."""
    merged: dict[str, Any] = {}
    for line in _objects(_tail(path / run_files.METRICS).splitlines()):
        merged |= line
    return merged


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects with a step; a line cut short is left out."""
    for text in lines:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and abs(line["step"]) < MAX_STEP:
            yield line


def _tail(path: Path) -> str:
    """The last TAIL_BYTES of a file, which may be gigabytes long."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _left(last: Mapping[str, Any], step: int | None, steps: int | None, *, age: float) -> float | None:
    per_step = number(last.get("step_seconds"))
    if per_step is None or not math.isfinite(per_step) or step is None or steps is None:
        return None
    return max(0.0, per_step * (steps - step) - age)


def _steps(path: Path, last: Mapping[str, Any]) -> int | None:
    try:
        found = _LENGTH.search((path / run_files.CONFIG).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    if not found or found[1] == "steps":
        return int(found[2]) if found else None
    step, epoch = number(last.get("step")), number(last.get("epoch"))
    if not step or not epoch or not 0 < epoch < math.inf:
        return None
    steps = step * int(found[2]) / epoch
    return math.ceil(round(steps, 6)) if steps < MAX_STEP else None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _json(path: Path) -> dict[str, Any]:
    loaded = _json_value(path)
    return loaded if isinstance(loaded, dict) else {}


def _json_value(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _asked_slurm(runs: Iterable[Run]) -> list[Run]:
    """`runs`, those with a Slurm job that nobody holds in the state that Slurm tells."""
    runs = list(runs)
    open_jobs = {run.slurm_job for run in runs if run.slurm_job and run.state not in ("running", "done")}
    states = (slurm_states.states(sorted(open_jobs)) if open_jobs else None) or {}
    return [_in_slurm(run, states.get(run.slurm_job)) if run.slurm_job else run for run in runs]


def _in_slurm(run: Run, state: str | None) -> Run:
    where = f"Slurm job {run.slurm_job}"
    if run.state == "running":
        return run._replace(where=f"{where}, {run.where}")
    if state in slurm_states.WAITING:
        return run._replace(state="pending", where=where)
    if state in slurm_states.WORKING:
        return run._replace(state="running", where=where)
    if state not in (None, slurm_states.GONE) and run.state in ("died", "pending"):
        return run._replace(state="died", error=f"Slurm ended job {run.slurm_job}: {state}")
    return run
