"""`python train.py`, `bridge-train`: compose, check, claim the run directory, run the workers, tell how it ended."""

import dataclasses
import os
import sys
from collections.abc import Callable

from bridge import platform
from bridge.config import layout, run_config
from bridge.config.run_config import RunConfig
from bridge.errors import BridgeError, ConfigError
from bridge.launch import compose, spawn, sweep, torchrun
from bridge.launch.result import EXIT_CODES, Result, log_path
from bridge.launch.run_dir import Claim, claimed

PATH_KEYS = frozenset({"runs_dir", "path", "paths", "tokenizer"})


def main() -> None:
    """Entry of train.py and bridge-train. Exit codes: 0 done, 1 failed, 2 wrong input, 75 stopped and resumable."""
    sys.path.append(os.getcwd())  # where a user's own modules (data.source=my_data.corpus) lie, as with python -m
    sys.exit(guarded(_torchrun_command if torchrun.active() else _command))


def guarded(command: Callable[[], int]) -> int:
    """Run a command line; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        return command()
    except BridgeError as error:
        print(" ".join(str(error).splitlines()), file=sys.stderr, flush=True)
        return EXIT_CODES["invalid"]


def _command() -> int:
    results: list[Result] = []
    rows: list[sweep.Row] = []

    def job(composed: compose.Job) -> float:
        if composed.number is None:
            results.append(_train(composed))
            return results[-1].objective
        rows.append(sweep.run_job(composed, _train))
        result = rows[-1].result
        if result.status == "stopped":  # a signal stops the whole sweep; Hydra lets a SystemExit through
            sys.exit(result.exit_code)
        return result.objective

    try:
        compose.run("train", job)
    finally:
        if rows:
            sweep.summarize(rows)
    if rows:
        return EXIT_CODES["done"] if all(row.result.status == "done" for row in rows) else EXIT_CODES["failed"]
    if not results:  # --cfg, --info
        return EXIT_CODES["done"]
    _print_ending(results[0])
    return results[0].exit_code


def _train(job: compose.Job) -> Result:
    """Check one job and train it in worker processes, or with dry_run print what it would take."""
    config = _config(job)
    num_devices = config.train.num_devices or platform.num_devices() or 1
    _check_layout(config, world_size=num_devices)
    if config.dry_run:
        return _dry_run(config, world_size=num_devices)
    with claimed(config, overrides=job.overrides, swept=None if job.number is None else job.swept) as claim:
        _print_start(claim, num_processes=num_devices)
        fields, restarts = config.routed().transformer, config.launch.max_restarts
        return spawn.run_workers(claim, num_devices=num_devices, fields=fields, max_restarts=restarts)


def _config(job: compose.Job) -> RunConfig:
    settings = compose.absolute(job.settings, names=PATH_KEYS)
    return run_config.from_dict(settings if job.number is None else sweep.placed(settings, job))


def _check_layout(config: RunConfig, *, world_size: int) -> None:
    layout.check(
        config.routed(),
        world_size=world_size,
        sequence_length=config.data["sequence_length"],
        train=config.train,
    )


def _dry_run(config: RunConfig, *, world_size: int) -> Result:
    platform.prepare()  # before estimate imports megatron-core
    from bridge import estimate

    print(estimate.report(config, world_size=world_size), flush=True)
    return Result("done")


def _torchrun_command() -> int:
    """One rank of `torchrun train.py ...`: rank 0 decides for all, then every rank trains."""
    torchrun.check_environment()
    if torchrun.rank() > 0:
        decision = torchrun.follow()
        if decision.settings is None:
            return decision.exit_code
        return _work(run_config.from_dict(decision.settings))
    with torchrun.leading() as leader:
        # An error is printed here, before the others leave with it: then torchrun ends this process too.
        leader.exit_code = guarded(lambda: _lead(leader))
        return leader.exit_code


def _lead(leader: torchrun.Leader) -> int:
    """Rank 0 of torchrun."""
    jobs: list[compose.Job] = []
    compose.run("train", lambda job: jobs.append(job) or 0.0)  # type: ignore[func-returns-value]
    if not jobs:  # --cfg, --info
        return EXIT_CODES["done"]
    if jobs[0].number is not None:
        torchrun.refuse_sweep()
    config = _config(jobs[0])
    _check_world(config)
    if config.dry_run:
        return _dry_run(config, world_size=torchrun.world_size()).exit_code
    with claimed(config, overrides=jobs[0].overrides) as claim:
        leader.publish(dataclasses.asdict(config))
        _print_start(claim, num_processes=torchrun.world_size())
        return _work(config)


def _check_world(config: RunConfig) -> None:
    world_size = torchrun.world_size()
    if config.launch.max_restarts > 0:
        raise ConfigError(
            f"launch.max_restarts: {config.launch.max_restarts} is for workers that train.py starts itself; "
            f"use `torchrun --max-restarts={config.launch.max_restarts}`"
        )
    if config.train.num_devices not in (None, world_size):
        raise ConfigError(
            f"train.num_devices: {config.train.num_devices} differs from the {world_size} processes that torchrun "
            f"started; leave it out under torchrun"
        )
    _check_layout(config, world_size=world_size)


def _work(config: RunConfig) -> int:
    from bridge.launch.worker import execute, kept_output, leave

    rank = torchrun.rank()
    with kept_output(log_path(config.run_dir, rank=rank), on_console=rank == 0):
        result = execute(config, rank=rank)
    _print_ending(result)
    if result.error is not None:
        leave(result.exit_code)
    if result.status == "stopped" and rank > 0:
        return EXIT_CODES["done"]  # at the first other code, torchrun kills the ranks that have still to write theirs
    return result.exit_code


def _print_start(claim: Claim, *, num_processes: int) -> None:
    begin = "from the start" if claim.resumed_step is None else f"resuming at step {claim.resumed_step}"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    print(f"run {claim.path}: {begin}, {processes}", flush=True)


def _print_ending(result: Result) -> None:
    if result.error is not None:
        print(result.error, file=sys.stderr, flush=True)
    elif result.status == "stopped" and result.step is None:
        print("stopped without a save; the same command goes on from the latest checkpoint, if any", flush=True)
