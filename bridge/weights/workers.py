"""Independent tasks by several forked processes, or in this one: results as they come, errors as if raised here.

A fork costs no start-up and shares torch's memory. The parent alone keeps accounts and prints; a worker's error ends
the others, and a worker whose parent was killed stops before its next task.
"""

import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from bridge.errors import BridgeError, ConversionError

BYTES_PER_WORKER = 10**9  # below that, a second process gains less than the eye sees
IN_FLIGHT = 8 * 10**9  # bytes that all workers together may hold, a tensor and its parts each
MAX_WORKERS = 8  # beyond, disks are the limit

Task = Callable[[int], Any]
Open = Callable[[int], AbstractContextManager[Task]]


def count(wanted: int | None, *, num_bytes: int, largest: int) -> int:
    """`wanted`, or as many workers as there are cores, as the bytes are worth and as their tensors leave memory for.

    `largest`: bytes of the largest tensor.
    """
    if wanted is not None:
        return wanted
    by_memory = IN_FLIGHT // (2 * max(largest, 1))
    return max(min(len(os.sched_getaffinity(0)), MAX_WORKERS, num_bytes // BYTES_PER_WORKER, by_memory), 1)


class Workers:
    """Runs tasks 0, 1, ... in `num_workers` processes; 1 is this process, without a fork.

    `open_task(number)` is entered once in each process and gives the function that does a task; workers count from 1,
    and this process is 0. What a task returns is sent to the parent.
    """

    def __init__(self, num_workers: int, open_task: Open) -> None:
        self._num_workers, self._open_task = num_workers, open_task
        self.peak_memory = 0  # bytes that the workers took beside this process, at their peaks together

    def run(self, num_tasks: int) -> Iterator[tuple[int, Any]]:
        """(task, result) in the order of completion. Raises what a task raised."""
        if self._num_workers == 1:
            with self._open_task(0) as task:
                for index in range(num_tasks):
                    yield index, task(index)
            return
        context = multiprocessing.get_context("fork")
        counter = context.Value("l", 0)
        workers: dict[Connection, ForkProcess] = {}
        try:
            for worker in range(1, self._num_workers + 1):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (self._open_task, worker, counter, num_tasks, sender, os.getpid())
                workers[receiver] = context.Process(target=_work, args=arguments, daemon=True)
                workers[receiver].start()
                sender.close()  # so that the pipe ends with the worker
            yield from self._collect(dict(workers))
        finally:
            for process in workers.values():
                process.kill()
            for process in workers.values():
                process.join()

    def _collect(self, workers: dict[Connection, ForkProcess]) -> Iterator[tuple[int, Any]]:
        while workers:
            for receiver in wait(list(workers)):
                assert isinstance(receiver, Connection)
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    process = workers.pop(receiver)
                    process.join()
                    raise ConversionError(_death(process.exitcode)) from None
                if kind == "error":
                    raise value
                if kind == "peak":
                    self.peak_memory += value
                    workers.pop(receiver).join()
                else:
                    yield value


def peak_memory() -> int:
    """Bytes this process had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _work(open_task: Open, worker: int, counter: Any, num_tasks: int, sender: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    before = _resident()
    try:
        with open_task(worker) as task:
            while os.getppid() == parent:
                with counter.get_lock():
                    index = counter.value
                    counter.value += 1
                if index >= num_tasks:
                    break
                sender.send(("result", (index, task(index))))
        sender.send(("peak", max(peak_memory() - before, 0)))
    except BridgeError as error:
        sender.send(("error", error))
    except BaseException:
        sender.send(("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _death(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return "workers: one was killed, probably for want of memory; set workers=1 or convert where there is more"
    return f"workers: one ended with exit code {exit_code}; set workers=1 to see why"
