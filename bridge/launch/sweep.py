"""`python train.py -m ...`: each job a process tree and run directory of its own; a table and sweep.json at the end."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge.config import run_config
from bridge.config.run_config import RunConfig
from bridge.errors import BridgeError, ConfigError
from bridge.files import read_yaml, write_json
from bridge.launch.compose import Composed, Point, swept_among
from bridge.runs import run_files
from bridge.runs.claim import is_of
from bridge.runs.result import (
    EXIT_CODES,
    Result,
    first_rank_error,
    invalid,
    print_error,
    read_result,
    unexpected,
)

MOST_WRONG = 10  # lines about wrong jobs of a sweep


class JobRow(NamedTuple):
    """One job of a sweep and how it ended."""

    number: int
    overrides: tuple[str, ...]
    run_dir: Path
    result: Result


def run_job(job: Composed, train: Callable[[Composed], Result]) -> JobRow:
    """Run one job; whatever goes wrong in it becomes its result, so that the other jobs still run."""
    assert job.number is not None
    announce(job)
    try:
        result = train(job)
    except BridgeError as error:
        result = invalid(error)
    except Exception as error:
        result = unexpected(error)
    print_error(result)
    return JobRow(job.number, job.swept, job.directory, result)


def announce(job: Composed) -> None:
    print(f"--- job {job.number}: {' '.join(job.swept) or 'nothing varied'}", flush=True)


def check_points(points: Sequence[Point], check: Callable[[Composed], object]) -> None:
    """Call `check` with every job of a grid, before the first is run. Prints a line for each that is wrong, MOST_WRONG
    at most, the last of which becomes a ConfigError; one line without a job when the same is wrong with all."""
    wrong: list[tuple[Point, ConfigError]] = []
    for point in points:
        try:
            if point.error is not None:
                raise point.error
            assert point.job is not None
            check(point.job)
        except ConfigError as error:
            wrong.append((point, error))
    if wrong:
        *others, last = _lines(wrong, all_are=len(wrong) == len(points))
        for line in others:
            print(line, file=sys.stderr, flush=True)
        raise ConfigError(last) from wrong[-1][1]
    _check_directories([point.job for point in points if point.job is not None])


def _lines(wrong: Sequence[tuple[Point, ConfigError]], *, all_are: bool) -> list[str]:
    said = [" ".join(str(error).splitlines()) for _, error in wrong]
    if all_are and len(set(said)) == 1:
        return said[:1]
    places = [f"job {point.number} ({' '.join(point.swept)}): " if point.swept else "" for point, _ in wrong]
    lines = [f"{place}{text}" for place, text in zip(places, said, strict=True)]
    more = len(lines) - MOST_WRONG
    return lines if more <= 0 else [*lines[:MOST_WRONG], f"... and {more} more jobs are wrong; correct these first"]


def _check_directories(jobs: Sequence[Composed]) -> None:
    first, taken = jobs[0], dict[Path, Composed]()
    for job in jobs:
        check_directory(job, expected=first.sweep_directory)
        other = taken.setdefault(job.directory, job)
        if other is not job:
            raise ConfigError(
                f"hydra.sweep.subdir: {job.directory.name!r} would be the directory of job {other.number} and of job "
                f"{job.number}; add ${{hydra.job.num}} or what is swept"
            )


def check_directory(job: Composed, *, expected: Path) -> None:
    """ConfigError when the directory of the whole sweep depends on what is swept: its summary has one place."""
    if job.sweep_directory == expected:
        return
    key = "name" if job.sweep_directory.name != expected.name else "hydra.sweep.dir"
    raise ConfigError(
        f"{key}: the jobs of a sweep share one directory, which would be {expected} and, for "
        f"'{' '.join(job.swept)}', {job.sweep_directory}; set name= and runs_dir= that do not depend on what is "
        f"swept, each job has its own directory below"
    )


def placed(settings: dict[str, Any], job: Composed) -> dict[str, Any]:
    """`settings` with name and runs_dir such that the run directory is job.directory, the same on every start."""
    below = os.path.relpath(job.directory, job.sweep_directory)
    if not run_config.is_name(below):
        raise ConfigError(
            f"hydra.sweep.subdir: {below!r} cannot name a directory; use {run_config.NAME_CHARACTERS}, as in "
            f"'hydra.sweep.subdir=lr${{optimizer.lr}}'"
        )
    settings = _grouped(settings, group=job.sweep_directory.name)
    relative = os.path.relpath(job.directory, settings["runs_dir"])
    if relative.startswith(os.pardir):  # hydra.sweep.dir points elsewhere
        return settings | {"runs_dir": str(job.directory.parent), "name": job.directory.name}
    return settings | {"name": relative}


def _grouped(settings: dict[str, Any], *, group: str) -> dict[str, Any]:
    """`settings` in which W&B, if it is asked for, shows the jobs of a sweep as a group."""
    log = settings.get("log") or {}
    wandb = log.get("wandb") or {}
    if wandb.get("project") is None or wandb.get("group") is not None:
        return settings
    return settings | {"log": log | {"wandb": wandb | {"group": group}}}


def check_suggestion(job: Composed) -> None:
    """ConfigError when an earlier start of this sweep gave the job's directory to other values.

    A sweeper that learns suggests the same values again, and so resumes its jobs, if its sampler has the same seed and
    each job the same result as before.
    """
    if not job.suggested:
        return
    file = job.directory / run_files.OVERRIDES
    saved = read_yaml(file) if file.exists() else None
    if saved and not set(job.swept) <= set(saved):
        keys = {override.partition("=")[0] for override in job.swept}
        held = " ".join(override for override in saved if override.partition("=")[0] in keys)
        raise ConfigError(
            f"name: {job.directory} holds the job '{held}', and the sweeper now suggests '{' '.join(job.swept)}': its "
            f"sampler has another seed, or earlier jobs ended otherwise; give this sweep another name="
        )


def earlier_result(config: RunConfig, job: Composed) -> Result | None:
    """What this very job ended with in an earlier start of the sweep, if it need not run again.

    That is so when it is done; and when a sweeper that learns was told that it failed, on which all later suggestions
    rest.
    """
    result = read_result(job.directory)
    if result is None or (result.status != "done" and not (job.suggested and result.status in ("failed", "invalid"))):
        return None
    return result if is_of(config, job.directory) else None


def collected(directory: Path, *, since: float, jobs: Sequence[Composed]) -> list[JobRow]:
    """The jobs in a sweep's directory that ended after `since`, a time.time(), by what they wrote themselves.

    jobs: those of a grid; a sweeper that suggests jobs tells nobody where they are.
    """
    numbers = {job.directory: job.number for job in jobs}
    files = sorted(directory.rglob(run_files.RESULT))
    recent = [file.parent for file in files if file.stat().st_mtime >= since]
    rows = []
    for place, folder in enumerate(recent):
        result = read_result(folder)
        if result is not None:
            overrides = read_yaml(folder / run_files.OVERRIDES)
            number = numbers.get(folder)
            if number is None:
                number = int(folder.name) if folder.name.isdigit() else place
            swept = swept_among(overrides, sys.argv[1:])
            rows.append(JobRow(number, swept, folder, first_rank_error(folder) or result))
    return sorted(rows, key=lambda row: row.number)


def not_started(jobs: Sequence[Composed], rows: Sequence[JobRow]) -> list[JobRow]:
    """Rows of those jobs of a grid that a stopped sweep never came to."""
    known = {row.number for row in rows}
    return [
        JobRow(job.number, job.swept, job.directory, Result("pending"))
        for job in jobs
        if job.number is not None and job.number not in known
    ]


def exit_code(rows: Sequence[JobRow]) -> int:
    """0 when every job is done (or left to Slurm), 75 when some were stopped and none failed, 2 when all are invalid,
    else 1."""
    codes = {row.result.exit_code for row in rows}
    if codes == {EXIT_CODES["invalid"]}:
        return EXIT_CODES["invalid"]
    return max(codes) if codes <= {0, EXIT_CODES["stopped"]} else EXIT_CODES["failed"]


def summarize(rows: Sequence[JobRow], directory: Path) -> None:
    """Print one line per job and write `directory`/sweep.json."""
    path = directory / run_files.SWEEP
    directory.mkdir(parents=True, exist_ok=True)
    write_json([_record(row, directory) for row in rows], path)
    header = ("job", "status", "step", "eval loss", "overrides", "error")
    table = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"written to {path}", flush=True)
    if any(row.result.step for row in rows):
        print(f"next: python -m bridge.sweep_report {shlex.quote(str(directory))}", flush=True)


def _cells(row: JobRow) -> tuple[str, ...]:
    result = row.result
    loss = "-" if result.eval_loss is None else f"{result.eval_loss:.4f}"
    step = "-" if result.step is None else str(result.step)
    return (str(row.number), result.status, step, loss, " ".join(row.overrides) or "-", result.error or "")


def _record(row: JobRow, directory: Path) -> dict[str, Any]:
    result = row.result
    return {
        "job": row.number,
        "overrides": list(row.overrides),
        "run_dir": str(row.run_dir),
        "directory": os.path.relpath(row.run_dir, directory),
        "status": result.status,
        "step": result.step,
        "eval_loss": result.eval_loss,
        "error": result.error,
    }
