"""Tasks by forked processes: every result once, errors as if raised here, and no process left."""

import multiprocessing
import os
import signal
import time
from contextlib import contextmanager

import pytest

from bridge.errors import ConversionError
from bridge.weights import workers
from bridge.weights.workers import Workers, count
from tests.distributed import run_distributed


def squares(closed):
    @contextmanager
    def open_task(number):
        yield lambda index: (number, index * index)
        (closed / str(number)).touch()

    return open_task


@pytest.mark.parametrize(("num_workers", "numbers"), [(1, {"0"}), (3, {"1", "2", "3"})])
def test_every_task_is_done_once_and_every_worker_closes(tmp_path, num_workers, numbers):
    group = Workers(num_workers, squares(tmp_path))
    results = dict(group.run(50))
    assert {index: square for index, (_, square) in results.items()} == {index: index**2 for index in range(50)}
    assert {str(number) for number, _ in results.values()} <= numbers
    assert set(os.listdir(tmp_path)) == numbers
    assert multiprocessing.active_children() == []


def failing(error):
    @contextmanager
    def open_task(_):
        def task(index):
            if index == 5:
                raise error
            time.sleep(0.01)

        yield task

    return open_task


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_users_error_is_raised_as_it_is(num_workers):
    with pytest.raises(ConversionError, match="^file: tensor x is damaged$"):
        list(Workers(num_workers, failing(ConversionError("file: tensor x is damaged"))).run(1000))
    assert multiprocessing.active_children() == []


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="(?s)in a worker process:.*KeyError: 'x'"):
        list(Workers(2, failing(KeyError("x"))).run(1000))


def test_a_killed_worker_is_told():
    @contextmanager
    def open_task(_):
        yield lambda index: index != 5 or os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ConversionError, match="^workers: one was killed, probably for want of memory; set workers=1"):
        list(Workers(2, open_task).run(1000))
    assert multiprocessing.active_children() == []


def test_leaving_early_ends_the_workers():
    results = Workers(2, failing(ConversionError("never"))).run(4)
    next(results)
    results.close()
    assert multiprocessing.active_children() == []


def memory_of_two_workers() -> int:
    @contextmanager
    def open_task(_):
        yield lambda index: len(bytearray(os.urandom(1 << 20)) * 64)

    group = Workers(2, open_task)
    assert len(list(group.run(8))) == 8
    return group.peak_memory


def test_memory_of_the_workers_is_counted():
    """In a process of its own: a worker forked from this one might free what other tests left, and hide its own."""
    (peak_memory,) = run_distributed(memory_of_two_workers, 1)
    assert 60e6 < peak_memory < 400e6


def test_how_many(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(4)))
    assert count(None, num_bytes=10**8, largest=10**6) == 1
    assert count(None, num_bytes=2 * 10**9, largest=10**6) == 2
    assert count(None, num_bytes=10**11, largest=10**6) == 4
    assert count(None, num_bytes=10**11, largest=2 * 10**9) == 2
    assert count(None, num_bytes=10**11, largest=10**10) == 1
    assert count(7, num_bytes=0, largest=0) == 7
