"""Runs a function on several ranks over gloo: worlds of processes that stay, and are sent one case after another.

The processes fork from a server that has imported megatron and bridge's training (multiprocessing's "forkserver",
started at first use, preloading tests/preload.py). It only ever imports, so it has no threads for a fork to lose; the
pytest process may do with torch whatever it likes. A process costs 0.1 s, the first training in one 0.3 s more than the
next: so a world stays, per number of ranks. What a case changes is put back (tests/pristine.py); one that fails, or
leaves a thread behind, ends its world, the next case has a new one.
"""

import atexit
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, NamedTuple

GRACE_SECONDS = 5.0  # for the other ranks after one has failed, and for a worker's own timeout to print its stacks
LOG_TAIL = 6000  # characters of each rank's output shown on failure

# What is imported for a GPU initialises CUDA, and then no process can be forked: they start from nothing there.
context = get_context("spawn" if Path("/dev/nvidiactl").exists() else "forkserver")
context.set_forkserver_preload(["tests.preload"])


class Case(NamedTuple):
    """What a rank is sent. call: the pickled function and arguments. log: the file that output goes to."""

    call: bytes
    env: Mapping[str, str]
    directory: str
    log: Path
    timeout: float


class Reply(NamedTuple):
    """What a rank answers to a case that went well. clean: the process may take another one."""

    value: Any
    clean: bool


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, fresh: bool = False
) -> list[Any]:
    """`fn(*args)` in `world_size` processes; what it returned, by rank.

    `fn` is a module-level function (workers import it by name); arguments and results are pickled. RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them: `fn` calls `bridge.parallel.initialize` once.
    fresh: in processes that have run nothing before and end afterwards: for what is measured, or kills itself, or
    forks, as megatron-core's own `dist_checkpointing.save` does.
    Raises AssertionError with every rank's traceback and output when one fails or `timeout` seconds pass.
    """
    if fresh:
        world = _World(world_size)
        try:
            return world.run(fn, args, timeout)
        finally:
            world.end()
    world = _worlds.pop(world_size, None) or _World(world_size)
    if not world.usable():  # it died while nobody looked
        world.end()
        world = _World(world_size)
    values = world.run(fn, args, timeout)
    if world.usable():
        _worlds[world_size] = world
    return values


class _World:
    """Processes that wait for cases."""

    def __init__(self, size: int) -> None:
        self.clean = True
        self.pipes, self.workers = [], []
        for _ in range(size):
            ours, theirs = context.Pipe()
            # Not daemonic: megatron-core's checkpoint writer starts processes of its own.
            worker = context.Process(target=_serve, args=(theirs,))
            worker.start()
            theirs.close()
            self.pipes.append(ours)
            self.workers.append(worker)

    def usable(self) -> bool:
        return self.clean and all(worker.is_alive() for worker in self.workers)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        from torch.distributed import TCPStore

        size, call = len(self.workers), pickle.dumps((fn, args))
        # The store lives here, on a port the kernel chose, and every rank is a client: no race for a free port.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        env = {
            **os.environ,
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
            logs = [Path(folder, f"{rank}.log") for rank in range(size)]
            for rank, pipe in enumerate(self.pipes):
                rank_env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                pipe.send_bytes(pickle.dumps(Case(call, rank_env, os.getcwd(), logs[rank], timeout)))
            replies = self._replies(timeout)
            if len(replies) < size:
                self.end()
                message = f"{fn.__qualname__} on {size} ranks failed"
                for rank, worker in enumerate(self.workers):
                    ending = "done" if rank in replies else f"exit code {worker.exitcode}"
                    message += f"\n--- rank {rank}, {ending}\n{_tail(logs[rank])}"
                raise AssertionError(message)
        self.clean = all(reply.clean for reply in replies.values())
        if not self.clean:
            self.end()
        return [replies[rank].value for rank in range(size)]

    def _replies(self, timeout: float) -> dict[int, Reply]:
        """By rank, of those that answer; once one has failed the others get GRACE_SECONDS, then SIGABRT, which prints
        their stacks."""
        deadline = time.monotonic() + timeout + GRACE_SECONDS
        replies: dict[int, Reply] = {}
        waiting = dict(enumerate(self.pipes))
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = connection.wait(waiting.values(), timeout=left)
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    replies[rank] = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, ConnectionResetError):
                    self.workers[rank].join()
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank in waiting:
            os.kill(self.workers[rank].pid, signal.SIGABRT)
            self.workers[rank].join()
        return replies

    def end(self) -> None:
        """A worker whose pipe is closed ends."""
        for pipe in self.pipes:
            pipe.close()
        for worker in self.workers:
            worker.join(GRACE_SECONDS)
            if worker.is_alive():
                worker.kill()
                worker.join()


_worlds: dict[int, _World] = {}


@atexit.register
def _end_worlds() -> None:  # before multiprocessing waits for them: registered later, called earlier
    while _worlds:
        _worlds.popitem()[1].end()


def _serve(pipe: connection.Connection) -> None:
    """Body of a worker: one case after another, until the other end is closed. A case that fails ends it."""
    import torch

    import tests.preload  # noqa: F401  # in a process that is not forked from the server
    from tests.pristine import Pristine

    torch.set_num_threads(1)
    pristine = Pristine()
    while True:
        try:
            case = pickle.loads(pipe.recv_bytes())
        except (EOFError, KeyboardInterrupt):
            return
        try:
            value = _work(case)
            reply = pickle.dumps(Reply(value, clean=pristine.restore()))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(reply)


def _work(case: Case) -> Any:
    """What the function of a case returned. Output and fatal tracebacks go to its log."""
    os.environ.clear()
    os.environ.update(case.env)
    os.chdir(case.directory)
    output = os.open(case.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later(case.timeout, exit=True, file=sys.stderr)
    fn, args = pickle.loads(case.call)
    value = fn(*args)
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a rank that leaves early resets connections its peers still read
        torch.distributed.destroy_process_group()
    return value


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return text[-LOG_TAIL:] or "(no output)"
