"""`python train.py -m ...`: each job a process tree and run directory of its own; a table and sweep.json at the end."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bridge.config.run_config import RunConfig
from bridge.errors import BridgeError, ConfigError
from bridge.launch.compose import Job, single_valued
from bridge.launch.result import (
    EXIT_CODES,
    Result,
    first_rank_error,
    invalid,
    print_error,
    read_result,
    result_path,
    unexpected,
    write_json,
)
from bridge.launch.run_dir import is_of


class Row(NamedTuple):
    """One job of a sweep and how it ended."""

    number: int
    overrides: tuple[str, ...]
    run_dir: Path
    result: Result


def run_job(job: Job, train: Callable[[Job], Result]) -> Row:
    """Run one job; whatever goes wrong in it becomes its result, so that the other jobs still run."""
    assert job.number is not None
    print(f"--- job {job.number}: {' '.join(job.swept) or 'nothing varied'}", flush=True)
    try:
        result = train(job)
    except BridgeError as error:
        result = invalid(error)
    except Exception as error:
        result = unexpected(error)
    print_error(result)
    return Row(job.number, job.swept, job.directory, result)


def placed(settings: dict[str, Any], job: Job) -> dict[str, Any]:
    """`settings` with name and runs_dir such that the run directory is job.directory, the same on every start."""
    settings = _grouped(settings, group=job.directory.parent.name)
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


def check_suggestion(job: Job) -> None:
    """ConfigError when an earlier start of this sweep gave the job's directory to other values.

    A sweeper that learns suggests the same values again, and so resumes its jobs, if its sampler has the same seed and
    each job the same result as before.
    """
    if not job.suggested:
        return
    try:
        saved = yaml.safe_load((job.directory / "overrides.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    if saved and not set(job.swept) <= set(saved):
        keys = {override.partition("=")[0] for override in job.swept}
        held = " ".join(override for override in saved if override.partition("=")[0] in keys)
        raise ConfigError(
            f"name: {job.directory} holds the job '{held}', and the sweeper now suggests '{' '.join(job.swept)}': its "
            f"sampler has another seed, or earlier jobs ended otherwise; give this sweep another name="
        )


def earlier_result(config: RunConfig, job: Job) -> Result | None:
    """What this very job ended with in an earlier start of the sweep, if it need not run again.

    That is so when it is done; and when a sweeper that learns was told that it failed, on which all later suggestions
    rest.
    """
    result = read_result(job.directory)
    if result is None or (result.status != "done" and not (job.suggested and result.status in ("failed", "invalid"))):
        return None
    return result if is_of(config, job.directory) else None


def collected(directory: Path, *, since: float) -> list[Row]:
    """The jobs in a sweep's directory that ended after `since`, a time.time(), by what they wrote themselves."""
    rows, fixed = [], single_valued(sys.argv[1:])
    for folder in sorted((path for path in directory.glob("[0-9]*") if path.name.isdigit()), key=lambda p: int(p.name)):
        result = read_result(folder)
        if result is not None and result_path(folder).stat().st_mtime >= since:
            overrides = yaml.safe_load((folder / "overrides.yaml").read_text(encoding="utf-8"))
            swept = tuple(override for override in overrides if override not in fixed)
            rows.append(Row(int(folder.name), swept, folder, first_rank_error(folder) or result))
    return rows


def exit_code(rows: Sequence[Row]) -> int:
    """0 when every job is done (or left to Slurm), 75 when some were stopped and none failed, else 1."""
    codes = {row.result.exit_code for row in rows}
    return max(codes) if codes <= {0, EXIT_CODES["stopped"]} else EXIT_CODES["failed"]


def summarize(rows: Sequence[Row]) -> None:
    """Print one line per job and write sweep.json beside the jobs' directories."""
    path = rows[0].run_dir.parent / "sweep.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json([_record(row) for row in rows], path)
    header = ("job", "status", "step", "eval loss", "overrides", "error")
    table = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"written to {path}", flush=True)


def _cells(row: Row) -> tuple[str, ...]:
    result = row.result
    loss = "-" if result.eval_loss is None else f"{result.eval_loss:.4f}"
    step = "-" if result.step is None else str(result.step)
    return (str(row.number), result.status, step, loss, " ".join(row.overrides) or "-", result.error or "")


def _record(row: Row) -> dict[str, Any]:
    result = row.result
    return {
        "job": row.number,
        "overrides": list(row.overrides),
        "run_dir": str(row.run_dir),
        "status": result.status,
        "step": result.step,
        "eval_loss": result.eval_loss,
        "error": result.error,
    }
