"""The worker of a run on this machine, started before its driver reads the command line: both import at the same time.

It is told which run to train through a socket, its standard input, and until then does nothing but import. Its driver
ends it when the command is refused or needs another process; it ends by itself when the driver has ended.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bridge.launch.environment import worker_environment
from bridge.processes import num_cores, of_child

if TYPE_CHECKING:
    from bridge.runs.claim import Claim

WORKER = "bridge.launch.worker"
# With one of these a command trains nothing, or elsewhere; only time is lost when the guess is wrong.
OTHER_COMMANDS = ("dry_run=", "plan=", "hydra/launcher=", "+hydra/launcher=", "train.num_nodes=")
FLAGS_OF_RUNS = ("-m", "--multirun", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")
# Variables that the driver sets meanwhile, ours, Hydra's and Optuna's: nothing that a worker imports reads them.
READ_LATER = ("BRIDGE_", "HYDRA_", "SQLALCHEMY_")


class Waiting(NamedTuple):
    """A worker that has not been told what to train, the socket to it, and where it was started."""

    process: "subprocess.Popen[bytes]"
    channel: socket.socket
    environment: dict[str, str]
    directory: str


_waiting: list[Waiting] = []  # one at most


def start(arguments: Sequence[str]) -> None:
    """Start the worker, if `arguments` look like a run in one process and there is a core for it."""
    if not _is_run(arguments) or num_cores() < 2:
        return
    environment = worker_environment(num_devices=1, fields={})
    ours, theirs = socket.socketpair()
    with theirs:
        # A session of its own, as for every worker: Ctrl-C reaches the driver only.
        command = [sys.executable, "-m", WORKER]
        process = subprocess.Popen(command, env=of_child(environment), stdin=theirs.fileno(), start_new_session=True)
    _waiting.append(Waiting(process, ours, environment, os.getcwd()))


def _is_run(arguments: Sequence[str]) -> bool:
    started_as_rank = "RANK" in os.environ or "SLURM_PROCID" in os.environ or "SUBMITIT_LOCAL_NTASKS" in os.environ
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    devices = [argument.partition("=")[2] for argument in arguments if argument.startswith("train.num_devices=")]
    return (
        not started_as_rank
        and flags <= set(FLAGS_OF_RUNS)
        and not any(argument.startswith(OTHER_COMMANDS) for argument in arguments)
        and (devices == ["1"] or (not devices and len(list(Path("/dev").glob("nvidia[0-9]*"))) < 2))
    )


def told(claim: "Claim", environment: dict[str, str]) -> "subprocess.Popen[bytes] | None":
    """The worker, told to train `claim`; None when there is none, or `environment` is not what it was started with."""
    if not _waiting:
        return None
    waiting = _waiting[0]
    changed = {name for name, _ in environment.items() ^ waiting.environment.items()}
    if waiting.directory != os.getcwd() or not all(name.startswith(READ_LATER) for name in changed):
        end()
        return None
    _waiting.clear()
    order = {"run_dir": str(claim.path), "environment": {name: environment.get(name) for name in changed}}
    with waiting.channel as channel:
        try:
            socket.send_fds(channel, [json.dumps(order).encode()], [claim.lock_fd])
        except OSError:  # it has died: a fresh one will tell why
            waiting.process.wait()
            return None
    return waiting.process


def end() -> None:
    """End the worker, if it still waits."""
    while _waiting:
        waiting = _waiting.pop()
        waiting.channel.close()
        waiting.process.send_signal(signal.SIGKILL)
        waiting.process.wait()


def run_dir() -> Path:
    """In the worker: import what training needs, then wait for the run directory. Leaves when the driver has ended."""
    gc.disable()
    with suppress(Exception):  # the run imports it again, where an error is reported
        import bridge.training.run  # noqa: F401
    gc.freeze()
    gc.enable()
    with socket.socket(fileno=0) as channel:
        text, descriptors, _, _ = socket.recv_fds(channel, 2**16, 1)
    if not text:
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(descriptors[0], True)  # the run directory's lock, as that of a worker started later
    order = json.loads(text)
    for name, value in order["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return Path(order["run_dir"])
