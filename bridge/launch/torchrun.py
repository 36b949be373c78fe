"""The ranks of one run that something else started: rank 0 alone composes and owns the run directory.

Rank 0 tells the others its decision through the store at MASTER_ADDR:MASTER_PORT where their process group meets later.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Decision(NamedTuple):
    """What rank 0 found: a configuration to train, or (None) nothing to do but leave with `exit_code`."""

    settings: dict[str, Any] | None
    exit_code: int = 0


class Leader:
    """Rank 0's side: publishes one decision."""

    def __init__(self) -> None:
        self.exit_code = 1  # what the other ranks leave with when there is nothing to train
        self._store: Store | None = None  # kept until the end: without torch elastic, this process serves the store

    def publish(self, settings: dict[str, Any] | None) -> None:
        """Tell every rank what to train. The first decision counts; later ones do nothing."""
        if self._store is None:
            self._store = _store()
            self._store.set("decision", json.dumps(Decision(settings, self.exit_code)))

    @property
    def decided(self) -> bool:
        return self._store is not None

    def wait_until_read(self) -> None:
        """Wait a little for the other ranks to read: they cannot once this process, and the store in it, has ended."""
        assert self._store is not None
        with suppress(RuntimeError):  # a rank that has died never reads
            self._store.wait([f"read_{rank}" for rank in range(1, world_size())], timedelta(seconds=20))


def active(env: Mapping[str, str] = os.environ) -> bool:
    """Whether something like torchrun started this process as one of many."""
    return "RANK" in env and "WORLD_SIZE" in env


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes on this node; unless told otherwise, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def starter() -> str:
    """What started this process as one of many, as the user knows it."""
    return "srun" if os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ["WORLD_SIZE"] else "torchrun"


def check_environment() -> None:
    """ConfigError when a variable that the ranks need to meet is not set."""
    for name in VARIABLES:
        if not os.environ.get(name):
            raise ConfigError(f"{name} is not set, but RANK and WORLD_SIZE are; start with torchrun, or unset both")


def refuse_sweep() -> None:
    """A sweep in every rank would train every job WORLD_SIZE times over."""
    local, nodes = local_world_size(), world_size() // local_world_size()
    start = f"train.num_devices={local}" if nodes == 1 else f"train.num_nodes={nodes} train.num_devices={local}"
    command = f"python train.py -m ... {start}" + (" hydra/launcher=slurm" if starter() == "srun" or nodes > 1 else "")
    raise ConfigError(
        f"hydra.mode: MULTIRUN under {starter()} (WORLD_SIZE={world_size()}); run `{command}`, which starts the "
        f"processes of every job itself"
    )


@contextmanager
def leading() -> Iterator[Leader]:
    """Rank 0: publish in the body; leaving it without sends the other ranks home with `exit_code`."""
    leader = Leader()
    try:
        yield leader
    except SystemExit as leaving:  # --help
        leader.exit_code = int(leaving.code or 0)
        raise
    finally:
        if not leader.decided:
            leader.publish(None)
            leader.wait_until_read()


def follow() -> Decision:
    """Ranks above 0: wait for rank 0's decision."""
    store = _store()
    settings, exit_code = json.loads(store.get("decision"))
    store.set(f"read_{rank()}", "")
    return Decision(settings, exit_code)


def _store() -> "Store":
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("bridge.launch", store)
