"""`python train.py`, `bridge-train`: compose, check, claim the run directory, run the workers, tell how it ended."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from bridge import platform
from bridge.command_line import INTERRUPTED, guarded
from bridge.config import run_config
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.launch import (
    compose,
    evaluation,
    hydra_keys,
    inputs,
    optuna,
    ranks,
    slurm,
    slurm_job,
    spawn,
    sweep,
    tether,
    tokenizer,
    torchrun,
    world,
)
from bridge.launch.ranks import RunToStart
from bridge.launch.worker import leave
from bridge.processes import python_path
from bridge.runs import run_files
from bridge.runs.claim import check_resumable, claimed, finished
from bridge.runs.result import EXIT_CODES, Result, read_result
from bridge.training.environment import COMMAND

PATH_KEYS = frozenset({"runs_dir", "path", "paths", "eval", "tokenizer", "eval_output"})


def main() -> None:
    """Entry of train.py and bridge-train.

    Exit codes: 0 done, 1 failed, 2 wrong input, 75 stopped and resumable, 130 Ctrl-C where no workers run.
    """
    sys.path.append(os.getcwd())  # where a user's own modules (data.source=my_data.corpus) lie, as with python -m
    os.environ[COMMAND] = shlex.join(sys.argv)
    ranks.adopt()
    if torchrun.active():
        leave(ranks.run(_composed_once))
    os.environ["PYTHONPATH"] = python_path()  # for the jobs of a launcher
    try:
        sys.exit(guarded(_command))
    except KeyboardInterrupt:  # no workers here to be told: those who run some answer it themselves
        started = compose.NoteSweep.started
        in_slurm = started is not None and started.launcher == hydra_keys.SUBMITIT_SLURM
        line = (
            "no longer waiting; the jobs go on: squeue --me" if in_slurm else "SIGINT: stopped; no run was in progress"
        )
        print(line, file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _command() -> int:
    results: list[Result] = []
    rows: list[sweep.JobRow] = []
    queued: dict[int, slurm.Queued] = {}
    grid: list[compose.Composed] = []
    driver = slurm_job.this_process()

    def job(composed: compose.Composed) -> Any:
        if slurm_job.this_process() != driver:  # submitit's stock launchers run this function in the job
            return _inside_job(composed)
        if composed.number is None:
            results.append(train(composed))
            if results[0].exit_code:
                raise compose.FailedTrial(results[0].error or results[0].status)
            return results[0].objective
        _check_place(composed)
        rows.append(sweep.run_job(composed, lambda job: train(job, queued)))
        result = rows[-1].result
        if result.status == "stopped":  # a signal stops the whole sweep; Hydra lets a SystemExit through
            sys.exit(result.exit_code)
        if composed.number in queued:  # the launcher asks for its objective when it has ended
            return queued[composed.number]
        if result.objective is None:
            raise compose.FailedTrial(result.error or "the evaluation loss is not finite")
        return result.objective

    def check_points(points: list[compose.Point]) -> bool:
        sweep.check_points(points, _check_point)
        grid.extend(point.job for point in points if point.job is not None)
        return not _shown(grid)

    try:
        compose.run("train", job, check_points=check_points)
    except compose.FailedTrial:
        pass  # of a single run; or hydra.sweeper.max_failure_rate ended the sweep, whose table tells
    except ConfigError as error:
        if not (rows and str(error).startswith(optuna.NO_TRIAL)):  # which the table tells better
            raise
    finally:
        if compose.NoteSweep.command is not None:
            compose.NoteSweep.command.release()
        rows = [row._replace(result=queued[row.number].result) if row.number in queued else row for row in rows]
        started = compose.NoteSweep.started
        if started is not None and not rows:
            rows = sweep.collected(started.directory, since=started.time, jobs=grid)
        if rows and started is not None:
            rows += sweep.not_started(grid, rows)
            sweep.summarize(rows, started.directory)
    if rows:
        return sweep.exit_code(rows)
    if grid and _is_dry(grid[0]):
        return EXIT_CODES["done"]
    if started is not None:
        print(f"no job of {started.directory} reported how it ended; see .submitit there", file=sys.stderr, flush=True)
        return EXIT_CODES["failed"]
    if not results:  # --cfg, --info
        return EXIT_CODES["done"]
    ranks.print_ending(results[0])
    return results[0].exit_code


def _is_dry(job: compose.Composed) -> bool:
    return bool(job.settings["dry_run"] or job.settings["plan"])


def _shown(grid: list[compose.Composed]) -> bool:
    """Print what dry_run and plan say of every job, if one of them is set; nothing is written then."""
    dry = _is_dry(grid[0])
    for job in grid if dry else ():
        sweep.announce(job)
        train(job)
    return dry


def _check_place(job: compose.Composed) -> None:
    """End the sweep when it goes another way than the one whose jobs are there: what follows would rest on others."""
    started = compose.NoteSweep.started
    try:
        sweep.check_suggestion(job)
        if started is not None:
            sweep.check_directory(job, expected=started.directory)
    except ConfigError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(EXIT_CODES["invalid"])


def train(job: compose.Composed, queued: dict[int, slurm.Queued] | None = None) -> Result:
    """Check one job and train it in worker processes or in a Slurm job, or with dry_run print what it would take.

    A sweep's Slurm job is only prepared, in `queued`: the launcher submits all of them.
    """
    config, num_devices = _checked(job)
    world_size = num_devices * config.train.num_nodes
    if config.plan:
        return _plan(config, world_size=world_size)
    if config.dry_run:
        return _dry_run(config, world_size=world_size)
    if config.eval_only:
        return _evaluate(config, job, num_devices=num_devices)
    earlier = _earlier(config, job)
    if earlier is not None:
        return earlier
    _check_start(config, job)
    swept = None if job.number is None else job.swept
    if job.slurm is not None:
        slurm.check_free(config.run_dir)
        with claimed(config, overrides=job.overrides, swept=swept):
            pass  # the job claims it again when it starts
        prepared = slurm.Queued(config, job.slurm)
        if queued is not None and job.number is not None:
            queued[job.number] = prepared
        else:
            slurm.run([prepared])
        return prepared.result
    with claimed(config, overrides=job.overrides, swept=swept) as claim:
        (claim.path / run_files.SLURM_JOB).unlink(missing_ok=True)
        ranks.print_start(claim, num_processes=num_devices)
        fields, restarts = config.routed.transformer, config.launch.max_restarts
        result = spawn.run_workers(
            claim, num_devices=num_devices, fields=fields, max_restarts=restarts, saves=config.checkpoint.save
        )
    if job.number is None:
        ranks.print_next(config, result)
    return result


def _checked(job: compose.Composed) -> tuple[RunConfig, int]:
    """A job's configuration, found legal, and its processes per machine."""
    config = config_of(job)
    num_devices = _processes_per_node(config, job)
    inputs.check_init(config)
    if not config.plan:
        world.check_layout(config, world_size=num_devices * config.train.num_nodes)
    return config, num_devices


def _check_start(config: RunConfig, job: compose.Composed) -> None:
    """ConfigError for what would end the run, though its configuration is legal."""
    if job.slurm is None:
        world.check_local(config)
        return
    world.check_restarts(config, starter="Slurm", instead="let Slurm requeue the job (launch.max_restarts=0)")
    inputs.check(config, in_queue=True)


def _check_point(job: compose.Composed) -> None:
    """What can be said here of a job that a launcher will start. submitit's set how many processes it has."""
    elsewhere = job.launcher.startswith(hydra_keys.SUBMITIT)
    config = config_of(job) if elsewhere else _checked(job)[0]
    if config.plan or config.dry_run or config.eval_only or sweep.earlier_result(config, job) is not None:
        return
    check_resumable(config, overrides=job.overrides, swept=job.swept)
    if not elsewhere:
        _check_start(config, job)


def _earlier(config: RunConfig, job: compose.Composed) -> Result | None:
    """What this very run ended with in an earlier start, when nothing is left to do; it is told here."""
    if job.number is None:
        result = finished(config)
        if result is not None:
            loss = "" if result.eval_loss is None else f" (eval loss {result.eval_loss:.4f})"
            print(f"run {config.run_dir}: done at step {result.step}{loss}; nothing left to do", flush=True)
            ranks.print_next(config, result)
        return result
    result = sweep.earlier_result(config, job)
    if result is not None:
        print(
            f"run {config.run_dir}: {result.status} in an earlier start; remove the directory to run it again",
            flush=True,
        )
        (config.run_dir / run_files.RESULT).touch()  # belongs to this start, too: `collected` goes by the time
    return result


def config_of(job: compose.Composed) -> RunConfig:
    settings = compose.absolute(job.settings, names=PATH_KEYS)
    config = run_config.from_dict(settings if job.number is None else sweep.placed(settings, job))
    if config.eval_only:
        config = evaluation.subject(config, run_dir=Path(settings["runs_dir"]) / settings["name"])
    return tokenizer.settled(config)


def _processes_per_node(config: RunConfig, job: compose.Composed) -> int:
    if job.slurm is not None:
        return slurm.processes_per_node(config, job.slurm)
    return config.train.num_devices or platform.num_devices() or 1


def _evaluate(config: RunConfig, job: compose.Composed, *, num_devices: int) -> Result:
    if job.slurm is not None:
        raise ConfigError(
            "hydra/launcher: slurm submits training runs; with eval_only=true start the command in an allocation, as "
            "`srun python train.py ...`"
        )
    world.check_local(config)
    swept = None if job.number is None else job.swept
    return evaluation.run(config, overrides=job.overrides, swept=swept, num_devices=num_devices)


def _dry_run(config: RunConfig, *, world_size: int) -> Result:
    platform.prepare()  # before estimate imports megatron-core
    from bridge import estimate

    print(estimate.report(config, world_size=world_size), flush=True)
    return Result("done")


def _plan(config: RunConfig, *, world_size: int) -> Result:
    platform.prepare()  # before plan_text imports megatron-core
    from bridge.estimate import plan_text

    print(plan_text.report(config, world_size=world_size), flush=True)
    return Result("done")


def _composed_once() -> RunToStart | None:
    """What `torchrun train.py ...` trains, composed by rank 0; None when there is nothing to train."""
    jobs = compose.jobs("train")
    if not jobs:  # --cfg, --info
        return None
    if jobs[0].number is not None:
        torchrun.refuse_sweep()
    if jobs[0].slurm is not None:
        raise ConfigError(
            f"hydra/launcher: slurm submits a job, but {torchrun.starter()} already runs {torchrun.world_size()} "
            "processes; leave one of the two out"
        )
    return _of_ranks(jobs[0])


def _of_ranks(job: compose.Composed) -> RunToStart | None:
    """Check a job against the processes that were started for it; None for a dry run, printed here."""
    config = config_of(job)
    if config.plan:
        _plan(config, world_size=torchrun.world_size())
        return None
    world.check_world(config)
    if config.dry_run:
        _dry_run(config, world_size=torchrun.world_size())
        return None
    if config.eval_only and job.number is not None:
        raise ConfigError("eval_only: true, but several tasks share a job of this sweep; use one task per node and job")
    return RunToStart(config, job.overrides, None if job.number is None else job.swept)


def _inside_job(composed: compose.Composed) -> float | None:
    """The task function in a job of submitit's stock launchers: drive worker processes, or be one of several ranks."""
    ranks.adopt()
    with tether.following() as wanted, slurm_job.stopping_on_usr2() as requeue:
        if not wanted:
            raise compose.FailedTrial("the sweep was stopped before this job")
        row = sweep.run_job(composed, _as_rank if torchrun.active() else train)
        if row.result.status == "stopped":
            requeue()
    if not (tether.tied() and row.result.status == "stopped"):
        slurm_job.end_with(row.result.exit_code)
    if row.result.objective is None:
        raise compose.FailedTrial(row.result.error or row.result.status)
    return row.result.objective


def _as_rank(job: compose.Composed) -> Result:
    exit_code = ranks.run(lambda: _of_ranks(job))
    status = next(status for status, code in EXIT_CODES.items() if code == exit_code)
    return (read_result(job.directory) if torchrun.rank() == 0 else None) or Result(status)
