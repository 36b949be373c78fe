"""A process that torchrun, srun or submitit started: which rank it is, and its share of one run.

torchrun says so in RANK, WORLD_SIZE, ...; for srun and submitit `adopt` sets the same variables. Rank 0 decides what is
trained and where, the others follow: they never compose, so no two ranks can come to different configurations.
"""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import NamedTuple

from bridge.command_line import guarded
from bridge.config import run_config
from bridge.config.run_config import RunConfig
from bridge.launch import evaluation, torchrun
from bridge.launch.environment import worker_environment
from bridge.launch.worker import execute, kept_output
from bridge.processes import num_cores
from bridge.runs import run_files
from bridge.runs.claim import Claim, claimed, latest_step
from bridge.runs.result import Result, print_error
from bridge.runs.run_files import rank_file
from bridge.weights.locate import HF_ASSETS, has_tokenizer

PORTS = (10000, 20000)  # first and how many: below the ports that Linux gives to outgoing connections


class RunToStart(NamedTuple):
    """What rank 0 found to train."""

    config: RunConfig
    overrides: list[str]
    swept: tuple[str, ...] | None = None  # None outside a sweep


def adopt(env: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables in a task of srun or submitit with more than one task; elsewhere change nothing.

    What the user has set of them stays.
    """
    if torchrun.active(env):
        return
    found = _of_slurm(env) or _of_submitit_local(env)
    for name, value in (found or {}).items():
        env.setdefault(name, value)


def run(prepare: Callable[[], RunToStart | None]) -> int:
    """This rank's share of a run; its exit code. prepare: called on rank 0 only; None: nothing to train, all is well.

    When the run stops early rank 0 alone says so (75), after every rank has saved: srun and torchrun end the other
    ranks as soon as one leaves with anything but 0. With nothing saved every rank says so: the others need not go on.
    """
    if not torchrun.active():
        return guarded(lambda: _lead(None, prepare))
    torchrun.check_environment()
    if torchrun.rank() > 0:
        decision = torchrun.follow()
        if decision.settings is None:
            return decision.exit_code
        result = _work(run_config.from_dict(decision.settings))
        return 0 if result.status == "stopped" and result.step is not None else result.exit_code
    with torchrun.leading() as leader:
        # An error is printed here, before the others leave with it: then torchrun ends this process too.
        leader.exit_code = guarded(lambda: _lead(leader, prepare))
        return leader.exit_code


def print_start(claim: Claim, *, num_processes: int) -> None:
    begin = "from the start" if claim.resumed_step is None else f"resuming at step {claim.resumed_step}"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    print(f"run {claim.path}: {begin}, {processes}", flush=True)


def print_ending(result: Result) -> None:
    print_error(result)
    if result.status == "stopped" and result.step is None:
        print("stopped without a save; the same command continues from the latest checkpoint, if any", flush=True)


def print_next(config: RunConfig, result: Result) -> None:
    """After a run that is done the commands that make something of its checkpoint; none that would not work."""
    if config.eval_only or not config.checkpoint.save or result.status != "done" or latest_step(config.run_dir) is None:
        return
    print("next:")
    print(f"  python convert.py mode=export megatron={config.run_dir} hf={config.run_dir}/export")
    if has_tokenizer(config.run_dir / run_files.CHECKPOINTS / HF_ASSETS):
        print(f"  python -m bridge.generate path={config.run_dir} prompt='def '")
    sys.stdout.flush()


def _lead(leader: torchrun.Leader | None, prepare: Callable[[], RunToStart | None]) -> int:
    prepared = prepare()
    if prepared is None:
        return 0
    if prepared.config.eval_only:  # which touches no run directory
        if leader is not None:
            leader.publish(dataclasses.asdict(prepared.config))
        evaluation.print_start(prepared.config, num_processes=torchrun.world_size())
        return _work(prepared.config).exit_code
    with claimed(prepared.config, overrides=prepared.overrides, swept=prepared.swept) as claim:
        if leader is not None:
            leader.publish(dataclasses.asdict(prepared.config))
        print_start(claim, num_processes=torchrun.world_size())
        result = _work(prepared.config)
        if prepared.swept is None:
            print_next(prepared.config, result)
        return result.exit_code


def _work(config: RunConfig) -> Result:
    os.environ.update(
        worker_environment(num_devices=torchrun.local_world_size(), fields=config.routed.transformer),
    )
    result = evaluation.in_own_directory(config, _execute) if config.eval_only else _execute(config)
    print_ending(result)
    return result


def _execute(config: RunConfig) -> Result:
    rank = torchrun.rank()
    with kept_output(rank_file(config.run_dir, "log", rank=rank), on_console=rank == 0) as console:
        return execute(config, rank=rank, terminal=console)


def _of_slurm(env: Mapping[str, str]) -> dict[str, str] | None:
    """torchrun's variables from those of a job step; None outside one, and in a step of one task.

    SLURM_NTASKS would not do: a batch script, which is no step, has it as well.
    """
    num_tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks == 1 or "SLURM_PROCID" not in env:
        return None
    local = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])]
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": _first_address(env["SLURM_STEP_NODELIST"]),
        # Steps of one job can run side by side.
        "MASTER_PORT": str(_port(int(env["SLURM_JOB_ID"]) + 7919 * int(env["SLURM_STEP_ID"]))),
        "OMP_NUM_THREADS": env.get("SLURM_CPUS_PER_TASK") or str(max(1, num_cores() // local)),
    }


def _of_submitit_local(env: Mapping[str, str]) -> dict[str, str] | None:
    num_tasks = env.get("SUBMITIT_LOCAL_NTASKS", "1")
    if num_tasks == "1":
        return None
    return {
        "RANK": env["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": env["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": num_tasks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port(int(env["SUBMITIT_LOCAL_JOB_ID"]))),
        "OMP_NUM_THREADS": str(max(1, num_cores() // int(num_tasks))),
    }


def _port(number: int) -> int:
    first, count = PORTS
    return first + number % count


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def _first_address(node_list: str) -> str:
    """Where the first node of `gpu[07-09,12]` can be reached. A node's name need not be its host's."""
    name = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", node_list)[0])
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        shown = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, timeout=60)
        address = re.search(r"NodeAddr=(\S+)", shown.stdout)
        return address[1] if address else name
