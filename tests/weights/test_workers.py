"""Tasks by several threads: every result once, errors as if raised here, and no thread left."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from bridge.errors import ConversionError
from bridge.weights import workers
from bridge.weights.workers import count, results


@pytest.fixture(autouse=True)
def nothing_left():
    num_threads = torch.get_num_threads()
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert torch.get_num_threads() == num_threads


def squares(closed, together):
    @contextmanager
    def open_task(number):
        together.wait(timeout=60)  # no worker is late
        yield lambda index: (number, index * index)
        (closed / str(number)).touch()

    return open_task


@pytest.mark.parametrize(("num_workers", "numbers"), [(1, {"0"}), (3, {"1", "2", "3"})])
def test_every_task_is_done_once_and_every_worker_closes(tmp_path, num_workers, numbers):
    open_task = squares(tmp_path, threading.Barrier(num_workers))
    done = list(results(open_task, num_tasks=5000, num_workers=num_workers))
    assert sorted((index, square) for index, (_, square) in done) == [(index, index**2) for index in range(5000)]
    assert {str(number) for _, (number, _) in done} <= numbers
    assert set(os.listdir(tmp_path)) == numbers


def test_tasks_run_beside_each_other():
    """Each of two tasks ends only when the other is there."""
    both = threading.Barrier(2)

    @contextmanager
    def open_task(_):
        yield lambda index: both.wait(timeout=60)

    assert len(list(results(open_task, num_tasks=2, num_workers=2))) == 2


def failing(error, asked):
    @contextmanager
    def open_task(_):
        def task(index):
            asked.append(index)
            if index == 5:
                raise error
            time.sleep(0.01)

        yield task

    return open_task


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_is_raised_as_it_is_and_ends_the_others(num_workers):
    asked = []
    open_task = failing(ConversionError("file: tensor x is damaged"), asked)
    with pytest.raises(ConversionError, match="^file: tensor x is damaged$") as caught:
        list(results(open_task, num_tasks=1000, num_workers=num_workers))
    assert caught.traceback[-1].name == "task"
    assert len(asked) < 1000


def test_an_error_on_opening_and_closing_is_raised_too():
    @contextmanager
    def unopened(_):
        raise OSError("full")
        yield

    @contextmanager
    def unclosed(_):
        yield lambda index: index
        raise OSError("full")

    for open_task in (unopened, unclosed):
        with pytest.raises(OSError, match="full"):
            list(results(open_task, num_tasks=4, num_workers=2))


def test_leaving_early_ends_the_workers():
    asked = []
    left = results(failing(ConversionError("x"), asked), num_tasks=100_000, num_workers=2)
    next(left)
    left.close()
    assert len(asked) < 100_000


def test_ctrl_c_is_heard_while_the_workers_are_busy():
    @contextmanager
    def open_task(_):
        def task(index):
            if index == 0:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

        yield task

    with pytest.raises(KeyboardInterrupt):
        list(results(open_task, num_tasks=1000, num_workers=2))


def test_how_many(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(4)))
    assert count(None, num_bytes=10**8, largest=10**6) == 1
    assert count(None, num_bytes=2 * 10**9, largest=10**6) == 2
    assert count(None, num_bytes=10**11, largest=10**6) == 4
    assert count(None, num_bytes=10**11, largest=2 * 10**9) == 2
    assert count(None, num_bytes=10**11, largest=10**10) == 1
    assert count(7, num_bytes=0, largest=0) == 7
