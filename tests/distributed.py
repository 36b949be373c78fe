"""Runs a function on several ranks over gloo in about a second: workers fork from a server that has imported megatron.

The server (multiprocessing's "forkserver", started at first use, preloading tests/preload.py) only ever imports, so it
has no OpenMP pool and no autograd threads for a fork to lose; the pytest process may do with torch whatever it likes.
"""

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
from typing import Any

GRACE_SECONDS = 5.0  # for the other ranks after one has failed, and for a worker's own timeout to print its stacks
LOG_TAIL = 6000  # characters of each rank's output shown on failure

context = get_context("forkserver")
context.set_forkserver_preload(["tests.preload"])


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """`fn(*args)` in `world_size` processes; what it returned, by rank.

    `fn` is a module-level function (workers import it by name); arguments and results are pickled. RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them: `fn` calls `bridge.parallel.initialize` once.
    Raises AssertionError with every rank's traceback and output when one fails or `timeout` seconds pass.
    """
    from torch.distributed import TCPStore

    # The store lives here, on a port the kernel chose, and every rank is a client: no race for a free port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    env = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(world_size)]
        results = [Path(folder, f"{rank}.pickle") for rank in range(world_size)]
        # Not daemonic: megatron-core's checkpoint writer starts processes of its own.
        workers = []
        for rank in range(world_size):
            rank_env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            work = (fn, args, rank_env, logs[rank], results[rank], timeout)
            workers.append(context.Process(target=_work, args=work))
            workers[-1].start()
        _join(workers, timeout)
        if any(worker.exitcode != 0 for worker in workers):
            message = f"{fn.__qualname__} on {world_size} ranks failed"
            for rank, worker in enumerate(workers):
                message += f"\n--- rank {rank}, exit code {worker.exitcode}\n{_tail(logs[rank])}"
            raise AssertionError(message)
        return [pickle.loads(path.read_bytes()) for path in results]


def _work(fn: Callable[..., Any], args: tuple, env: Mapping[str, str], log: Path, result: Path, timeout: float) -> None:
    """Body of one worker: output and fatal tracebacks go to `log`, the pickled return value to `result`."""
    os.environ.clear()
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later(timeout, exit=True, file=sys.stderr)
    import torch

    torch.set_num_threads(1)
    try:
        value = fn(*args)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # a rank that leaves early resets connections its peers still read
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    result.write_bytes(pickle.dumps(value))
    faulthandler.cancel_dump_traceback_later()


def _join(workers: list[Any], timeout: float) -> None:
    """Waits for all; once one has failed the others get GRACE_SECONDS, then SIGABRT, which prints their stacks."""
    deadline = time.monotonic() + timeout + GRACE_SECONDS
    while alive := [worker for worker in workers if worker.is_alive()]:
        connection.wait([worker.sentinel for worker in alive], timeout=max(0.0, deadline - time.monotonic()))
        if any(worker.exitcode for worker in workers):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() >= deadline:
            for worker in alive:
                os.kill(worker.pid, signal.SIGABRT)
            for worker in alive:
                worker.join()
            return


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return text[-LOG_TAIL:] or "(no output)"
