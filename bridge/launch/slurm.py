"""`hydra/launcher=slurm`: the driver prepares every run directory, submits one Slurm job per run and waits for them.

A job trains the config.yaml that was written when it was submitted: it never composes, and what is wrong with the
command line shows before anything is queued.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.files import write_json
from bridge.launch.slurm_job import RunJob
from bridge.runs import run_files, slurm_states
from bridge.runs.result import Result, first_rank_error, read_result, write_result

SRUN_ARGS = ("--kill-on-bad-exit=1", "--open-mode=append")  # append: a requeued job keeps its earlier output
TARGET = "hydra_plugins.bridge_slurm.SlurmLauncher"


@dataclass
class Queued:
    """A run whose directory is prepared, and its Slurm job. options: conf/hydra/launcher/slurm.yaml."""

    config: RunConfig
    options: Mapping[str, Any]
    job_id: str | None = None
    result: Result = field(default_factory=lambda: Result("submitted"))

    @property
    def processes_per_node(self) -> int:
        return processes_per_node(self.config, self.options)


def processes_per_node(config: RunConfig, options: Mapping[str, Any]) -> int:
    """train.num_devices, by default one per GPU that is asked for, or one. The GPUs of this machine say nothing."""
    gpus = options.get("gpus_per_node")
    devices = config.train.num_devices
    if gpus is not None and devices not in (None, gpus):
        raise ConfigError(
            f"train.num_devices: {devices} differs from hydra.launcher.gpus_per_node ({gpus}); set one of the two"
        )
    return devices or gpus or 1


def check_free(run_dir: Path) -> None:
    """ConfigError when an unfinished Slurm job is to train in `run_dir`: waiting in the queue, it holds no lock."""
    try:
        job_id = str(json.loads((run_dir / run_files.SLURM_JOB).read_text(encoding="utf-8"))["slurm_job_id"])
    except FileNotFoundError:
        return
    state = (slurm_states.states([job_id]) or {}).get(job_id)
    if state in slurm_states.UNFINISHED:
        raise ConfigError(
            f"name: {run_dir} belongs to Slurm job {job_id} ({state}); wait for it, `scancel {job_id}`, or set "
            f"another name="
        )


def run(jobs: Sequence[Queued], *, ended: Callable[[Result], None] = lambda result: None) -> None:
    """Submit the jobs and, unless launch.detach, wait for all of them; fills in job_id and result.

    ended: called with the result of each job when it is known.
    """
    for job in jobs:
        _submit(job)
    waiting = [job for job in jobs if not job.config.launch.detach]
    try:
        _wait(waiting, ended)
    except KeyboardInterrupt:
        left = " ".join(str(job.job_id) for job in waiting if job.result.status == "submitted")
        print(f"no longer waiting; the jobs go on: squeue --jobs={left}, scancel {left}", file=sys.stderr, flush=True)
        sys.exit(130)


def is_refused_by_sbatch(error: Exception) -> bool:
    """Whether `error` is submitit's about a job that sbatch did not take."""
    cause = error.__cause__
    return isinstance(cause, subprocess.CalledProcessError) and cause.cmd[0] == "sbatch"


def refused_by_sbatch(error: Exception) -> str:
    """The line for such an error, with the last that sbatch said."""
    said = str(error).strip().splitlines()[-1]
    return f"hydra.launcher: {said}; set what this cluster asks for (partition, account, ...)"


def _submit(job: Queued) -> None:
    """Hand one job to Slurm. ConfigError with what sbatch said when it refuses."""
    try:
        import submitit
    except ImportError:
        raise ConfigError("hydra/launcher: slurm needs the extra `slurm`; pip install 'bridge[slurm]'") from None
    run_dir, options = job.config.run_dir, dict(job.options)
    try:
        executor = submitit.SlurmExecutor(folder=run_dir / "slurm", max_num_timeout=options.pop("max_num_timeout"))
        executor.update_parameters(**_sbatch_options(job, options))
        with _outside_a_job():
            job.job_id = executor.submit(RunJob(str(run_dir))).job_id
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(refused_by_sbatch(error)) from None
    except RuntimeError as error:  # no srun on the path
        raise ConfigError(f"hydra/launcher: slurm, but {error} run this where sbatch works") from None
    submitted = {"slurm_job_id": job.job_id, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(submitted, run_dir / run_files.SLURM_JOB)
    shape = f"{job.config.train.num_nodes} x {job.processes_per_node} processes"
    print(f"Slurm job {job.job_id}: {run_dir}, {shape}", flush=True)


@contextmanager
def _outside_a_job() -> Iterator[None]:
    """Without the variables of the job that this may run in: sbatch and srun would take them for options."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    import submitit

    kept = {name: os.environ[name] for name in os.environ if name == "SLURM_CONF" or name.startswith("SBATCH_")}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def _sbatch_options(job: Queued, options: dict[str, Any]) -> dict[str, Any]:
    """submitit's names: those of sbatch, but for `time` in minutes and `mem` in GB."""
    srun_args = list(SRUN_ARGS)
    if options.get("cpus_per_task"):  # srun no longer takes it from sbatch
        srun_args.append(f"--cpus-per-task={options['cpus_per_task']}")
    renamed = {"timeout_min": "time", "mem_gb": "mem"}
    given = {renamed.get(name, name): value for name, value in options.items() if value is not None}
    return given | {
        "job_name": job.config.name,
        "nodes": job.config.train.num_nodes,
        "ntasks_per_node": job.processes_per_node,
        "srun_args": [*srun_args, *given.get("srun_args", ())],
        "additional_parameters": {"requeue": True, **given.get("additional_parameters", {})},
    }


def _wait(jobs: Sequence[Queued], ended: Callable[[Result], None]) -> None:
    """Until no job is in the queue any more; a requeued one still is."""
    waiting = {str(job.job_id): job for job in jobs}
    pause = 0.5
    while waiting:
        time.sleep(pause)
        pause = min(pause * 1.2, 5.0)
        for job_id, state in (slurm_states.states(waiting) or {}).items():
            if state in slurm_states.UNFINISHED:
                continue
            job = waiting.pop(job_id)
            job.result = _outcome(job, state)
            write_result(job.result, job.config.run_dir)
            ended(job.result)


def _outcome(job: Queued, state: str) -> Result:
    """How a job ended: what its ranks wrote; where they could not, the state that Slurm saw."""
    run_dir = job.config.run_dir
    result = first_rank_error(run_dir) or read_result(run_dir)
    if result is None or (result.status == "done" and state not in ("COMPLETED", slurm_states.GONE)):
        error = f"Slurm job {job.job_id} of {run_dir} ended as {state}; its output is in {run_dir / 'slurm'}"
        return replace(result or Result("failed"), status="failed", error=error)
    return result
