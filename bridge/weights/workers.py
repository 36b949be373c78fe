"""Independent tasks by several threads, or by this one: results as they come, errors as if raised here.

Reading, casting, merging and writing a tensor releases the interpreter, so threads share out the cores. Processes would
have to be started afresh, seconds each: one that has threads, as every one does that uses torch, must not fork.
"""

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

BYTES_PER_WORKER = 10**9  # below that, a second one gains less than the eye sees
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


class _Message(NamedTuple):
    """From a worker: the result of a task, or with task=None that it has ended, by an error or well."""

    task: int | None
    result: Any = None
    error: BaseException | None = None


def results(open_task: Open, *, num_tasks: int, num_workers: int) -> Iterator[tuple[int, Any]]:
    """(task, result) of tasks 0, 1, ... in the order of completion, by `num_workers` threads; 1 is this thread.

    `open_task(number)` is entered once in each thread and gives the function that does a task; workers count from 1,
    and this thread is 0. Raises what a task raised. However this ends, no thread is left: each ends after its task.
    """
    if num_workers == 1:
        with open_task(0) as task:
            for index in range(num_tasks):
                yield index, task(index)
        return
    tasks = iter(range(num_tasks))  # shared: the interpreter's lock gives each index to one thread
    messages: SimpleQueue[_Message] = SimpleQueue()
    stop = threading.Event()
    num_threads = torch.get_num_threads()
    workers = [
        threading.Thread(target=_work, args=(open_task, number, tasks, messages, stop), daemon=True)
        for number in range(1, num_workers + 1)
    ]
    try:
        for worker in workers:
            worker.start()
        for _ in range(num_tasks + num_workers):
            finished, result, error = messages.get()
            if error is not None:
                raise error
            if finished is not None:
                yield finished, result
    finally:
        stop.set()
        for worker in workers:
            if worker.ident is not None:  # started
                worker.join()
        torch.set_num_threads(num_threads)


def _work(
    open_task: Open, number: int, tasks: Iterator[int], messages: "SimpleQueue[_Message]", stop: threading.Event
) -> None:
    torch.set_num_threads(1)  # of torch's own threads within an operation: the cores are shared out by tasks
    try:
        with open_task(number) as task:
            for index in tasks:
                if stop.is_set():
                    break
                messages.put(_Message(index, task(index)))
        messages.put(_Message(None))
    except BaseException as error:
        messages.put(_Message(None, error=error))


def peak_memory() -> int:
    """Bytes this process had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
