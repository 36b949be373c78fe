"""The run directory runs/NAME: one process tree at a time, its configuration on file, one model on every resume."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bridge.config import run_config
from bridge.config.architecture import NOT_ARCHITECTURE
from bridge.config.run_config import RunConfig
from bridge.errors import BridgeError, ConfigError, shown
from bridge.files import read_yaml
from bridge.runs import result, run_files
from bridge.weights import locate, pointer

# What a checkpoint is made of: another value would load wrong weights, optimizer state or samples. `train.seed` orders
# the samples. Learning rates, steps, batch sizes, layouts and logging may change between resumes.
FIXED_SECTIONS = ("model", "peft", "data")
FIXED_KEYS = ("precision.params_dtype", "precision.bf16", "precision.fp16", "optimizer.optimizer", "train.seed")
FREE_KEYS = (
    "data.cache_dir",
    "data.num_workers",
    *(f"model.{name}" for name in NOT_ARCHITECTURE - {"family"}),
)
FREE_IN_SWEEPS = (
    "train.",
    "checkpoint.",
    "log.",
    "rerun.",
    "launch.",
    "parallelism",
)  # may change between two starts of the same sweep


class Claim(NamedTuple):
    """A run directory that this process holds."""

    path: Path
    lock_fd: int  # passed on to the workers: the lock lasts as long as any of them
    resumed_step: int | None  # of the latest checkpoint; None without one


@contextmanager
def claimed(config: RunConfig, *, overrides: list[str], swept: Sequence[str] | None = None) -> Iterator[Claim]:
    """Hold config.run_dir: locked, found compatible, config.yaml and overrides.yaml written.

    ConfigError when another process holds it, or when it has a checkpoint made with other fixed settings (nothing is
    written then). swept: those of the overrides that a sweep varies; None outside a sweep.
    """
    path = config.run_dir
    with _writing(path):
        (path / run_files.LOGS).mkdir(parents=True, exist_ok=True)
        lock_fd = _lock(path, name=config.name)
    try:
        step = check_resumable(config, overrides=overrides, swept=swept)
        with _writing(path):
            result.forget(path)
            run_config.write(config, path / run_files.CONFIG)
            (path / run_files.OVERRIDES).write_text(yaml.safe_dump(overrides, sort_keys=False), encoding="utf-8")
        yield Claim(path, lock_fd, step)
    finally:
        os.close(lock_fd)


def check_resumable(config: RunConfig, *, overrides: Sequence[str], swept: Sequence[str] | None = None) -> int | None:
    """The step of the latest checkpoint in config.run_dir, None without. ConfigError when `claimed` would refuse it."""
    path = config.run_dir
    step = latest_step(path)
    if step is not None:
        _check_unchanged(config, path)
        _check_steps(config, path, done=step)
        if swept is not None:
            _check_same_job(overrides, swept, path)
    return step


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"runs_dir: {error.filename or path} cannot be written ({error.strerror}); "
            f"{'free some space or ' if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}set another runs_dir="
        ) from error


def _lock(path: Path, *, name: str) -> int:
    """Take an exclusive flock, freed by the kernel when its last holder ends, however that happens."""
    lock_fd = os.open(path / run_files.LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    if not _flocked(lock_fd):
        holder = os.read(lock_fd, 200).decode(errors="replace").strip() or "another process"
        os.close(lock_fd)
        raise ConfigError(f"name: '{name}' is in use by {holder} ({path}); wait for it or set another name=")
    os.ftruncate(lock_fd, 0)
    os.write(lock_fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock_fd


def _flocked(lock_fd: int) -> bool:
    for pause in (
        0.05,
        0.1,
        0.2,
        0.0,
    ):  # `read`, to see whether a run is alive, holds its lock for an instant
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(pause)
    return False


def latest_step(path: Path) -> int | None:
    """The step of the latest checkpoint in the run directory `path`, None without one."""
    latest = pointer.read(path / run_files.CHECKPOINTS)
    return None if latest is None else pointer.iteration_of(latest)


def finished(config: RunConfig) -> result.Result | None:
    """How the run ended, if the same configuration is done (by train.patience early), and its checkpoint is there."""
    path = config.run_dir
    try:
        ended = result.read_result(path)
        if ended is None or ended.status != "done" or ended.step is None or ended.step != latest_step(path):
            return None
        locate.locate(path)
    except (BridgeError, ValueError, TypeError):  # damaged: for the run itself to tell
        return None
    return ended if is_of(config, path) else None


def is_of(config: RunConfig, path: Path) -> bool:
    """Whether `config` is the one in a run directory's config.yaml."""
    try:
        return run_config.read(path / run_files.CONFIG) == config
    except ConfigError:
        return False


def _check_unchanged(config: RunConfig, path: Path) -> None:
    saved_path = path / run_files.CONFIG
    if not saved_path.is_file():
        raise ConfigError(f"name: {path} has checkpoints but no config.yaml to resume from; set another name=")
    saved, new = _fixed(run_config.read(saved_path)), _fixed(config)
    differing = [key for key in sorted(saved.keys() | new.keys()) if saved.get(key) != new.get(key)]
    if differing:
        changes = ", ".join(f"{key} {_shown(saved, key)} -> {_shown(new, key)}" for key in differing)
        weights = any(key.startswith("model.") for key in differing)
        way_on = "" if weights else f" (with init.path={path} it starts from these weights)"
        raise ConfigError(
            f"{differing[0]}: {path} holds checkpoints of another configuration ({changes}); set the earlier values, "
            f"or another name={way_on}"
        )


def _check_steps(config: RunConfig, path: Path, *, done: int) -> None:
    if config.train.steps is not None and config.train.steps < done:
        raise ConfigError(
            f"train.steps: {config.train.steps}, but {path} has already done {done}; set more than {done} to "
            "continue, or another name= to train again from the start"
        )


def _check_same_job(overrides: Sequence[str], swept: Sequence[str], path: Path) -> None:
    """Job directories are numbered: another sweep of that name must not resume them as if they were its own."""
    saved = read_yaml(path / run_files.OVERRIDES)
    missing = {o for o in overrides if o in swept or not o.startswith(FREE_IN_SWEEPS)} - set(saved)
    extra = {o for o in saved if not o.startswith(FREE_IN_SWEEPS)} - set(overrides)
    if missing or extra:
        raise ConfigError(
            f"name: {path} holds the job '{' '.join(saved)}', not '{' '.join(overrides)}'; "
            f"give this sweep another name="
        )


def _fixed(config: RunConfig) -> dict[str, Any]:
    """Full key -> value of everything that may not change once there is a checkpoint."""
    values: dict[str, Any] = {}
    for section in FIXED_SECTIONS:
        values |= _flat(getattr(config, section), prefix=section)
    for key in FREE_KEYS:
        values.pop(key, None)
    for key in FIXED_KEYS:
        section, _, name = key.partition(".")
        holder = getattr(config, section)
        values[key] = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name)
    return values


def _flat(section: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        full = f"{prefix}.{key}"
        flat |= _flat(value, prefix=full) if isinstance(value, Mapping) else {full: value}
    return flat


def _shown(values: dict[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else "(not set)"
