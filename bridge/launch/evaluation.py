"""eval_only=true: which model is evaluated, and where its workers keep what only they need. No run is touched."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bridge.config.run_config import RunConfig
from bridge.config.schema import Init
from bridge.errors import ConfigError
from bridge.launch import spawn
from bridge.runs import run_files
from bridge.runs.claim import claimed, latest_step
from bridge.runs.result import Result


def subject(config: RunConfig, *, run_dir: Path) -> RunConfig:
    """`config` with init.path set to what is evaluated: unless the user has, to the run in `run_dir`."""
    if config.init.path is not None:
        return config
    if latest_step(run_dir) is None:
        raise ConfigError(
            f"init.path: is not set, and {run_dir} has no checkpoint to evaluate; set init.path=DIR, or name= to a run"
        )
    return replace(config, init=Init(path=str(run_dir)))


def run(config: RunConfig, *, overrides: list[str], swept: Sequence[str] | None, num_devices: int) -> Result:
    """Evaluate in worker processes on this machine. swept: as for `claimed`; a sweep's job has a directory of its own,
    another evaluation none."""

    def work(config: RunConfig) -> Result:
        with claimed(config, overrides=overrides, swept=swept) as claim:
            print_start(config, num_processes=num_devices)
            fields, restarts = config.routed.transformer, config.launch.max_restarts
            return spawn.run_workers(claim, num_devices=num_devices, fields=fields, max_restarts=restarts, saves=False)

    if swept is None:
        return in_own_directory(config, work)
    path = config.run_dir
    if latest_step(path) is not None or (path / run_files.METRICS).exists():
        raise ConfigError(f"name: {path} holds a training run, which an evaluation must not change; set another name=")
    return work(config)


def in_own_directory(config: RunConfig, work: Callable[[RunConfig], Result]) -> Result:
    """`work` with a temporary directory for the run's, which only a failure leaves behind, for its logs."""
    folder = Path(tempfile.mkdtemp(prefix="bridge-evaluation-"))
    result = None
    try:
        result = work(replace(config, runs_dir=str(folder.parent), name=folder.name))
    finally:
        if result is None or result.status != "failed":
            shutil.rmtree(folder, ignore_errors=True)
    return result


def print_start(config: RunConfig, *, num_processes: int) -> None:
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    print(f"evaluating {config.init.path}, {processes}", flush=True)
