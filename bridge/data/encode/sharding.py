"""Texts or rows become shards of tokens, by several processes. A shard that is there is not made again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bridge.config import durations
from bridge.errors import ConfigError, RunError
from bridge.processes import num_cores, of_child, python_path

SHARDS = 64  # of an input, unless they were too small or too large for that
SMALLEST, LARGEST = 1 << 18, 1 << 24  # characters of a shard
INTERVAL = 10.0  # seconds between two lines on how far it is; on a terminal it is one line
LIVE_INTERVAL = 0.5
MODULE = "bridge.data.encode.process"


class Made(NamedTuple):
    """What a shard holds: documents or samples, and their tokens."""

    number: int
    tokens: int


# Makes the shard of a prefix from texts or rows; it appears when it is whole.
Work = Callable[[str, Sequence[Any]], Made]


class Job(Protocol):
    """What a process is told to do; it gets it pickled."""

    @property
    def unit(self) -> str:
        """What `Made` counts, for people."""

    def is_whole(self, prefix: str) -> bool:
        """Whether that shard is there; one that a kill or a crash of the machine cut off is not."""

    def start(self) -> Work:
        """The work, once what it needs is loaded."""


def num_processes(asked: int | None, size: int, *, worth: int = 1) -> int:
    """How many processes encode `size` bytes: as many as are asked for, else one per core that has `worth` bytes to do.

    Never more than there are chunks.
    """
    most = max(1, size // worth) if asked is None else asked
    return min(num_cores() if asked is None else asked, most, max(1, size // _target(size)))


def _target(size: int) -> int:
    return min(max(size // SHARDS, SMALLEST), LARGEST)


class Chunk(NamedTuple):
    number: int
    items: list[Any]
    read: float  # share of the input that is read with it


def chunks(
    items: Iterable[Any], *, size: int, share_read: Callable[[], float], characters: Callable[[Any], int] = len
) -> Iterator[Chunk]:
    """`items`, texts or rows, in pieces that depend on nothing but themselves and the input's `size` in bytes."""
    target = _target(size)
    number, held, length = 0, list[Any](), 0
    for item in items:
        held.append(item)
        length += characters(item)
        if length >= target:
            yield Chunk(number, held, share_read())
            number, held, length = number + 1, [], 0
    if held:
        yield Chunk(number, held, share_read())


def write(directory: Path, found: Iterable[Chunk], *, job: Job, here: Work, num_processes: int) -> list[str]:
    """The prefixes of the shards below `directory`, in the order of the chunks; those that are missing are made.

    here: what `job.start()` gives, for this process, which needs no other if `num_processes` is 1. Raises what stands
    in the way of the first chunk that cannot be made, however many processes there are.
    """
    progress = _Progress(job.unit)
    prefixes: list[str] = []

    def missing() -> Iterator[tuple[str, Chunk]]:
        for chunk in found:
            prefix = str(directory / f"{chunk.number:06d}")
            if job.is_whole(prefix):
                progress.kept(chunk)
            else:
                yield prefix, chunk
            prefixes.append(prefix)

    if num_processes > 1:
        _spread(missing(), job, num_processes, progress)
    else:
        for prefix, chunk in missing():
            progress.made(chunk, here(prefix, chunk.items))
    progress.end()
    return prefixes


def _spread(missing: Iterator[tuple[str, Chunk]], job: Job, number: int, progress: "_Progress") -> None:
    """Each chunk to the next process that has nothing to do."""
    failed: dict[int, Exception] = {}
    last = -1
    with _processes(job, number) as processes:
        idle = list(processes)

        def wait() -> None:
            busy = {process.pipe: process for process in processes if process.chunk}
            for pipe in connection.wait(list(busy)):
                chunk, answer = busy[pipe].take()  # type: ignore[index]
                if isinstance(answer, Made):
                    progress.made(chunk, answer)
                else:
                    failed[chunk.number] = answer
                idle.append(busy[pipe])  # type: ignore[index]

        try:
            for prefix, chunk in missing:
                if not idle:
                    wait()
                if failed:
                    break
                idle.pop().give(prefix, chunk)
                last = chunk.number
        except ConfigError as error:  # the rest cannot be read; but what comes before that may have a fault, too
            failed[last + 1] = error
        while len(idle) < number:
            wait()
    if failed:
        raise failed[min(failed)]


class _Process:
    """One process that encodes, and what it works on."""

    def __init__(self, job: Job) -> None:
        self.chunk: Chunk | None = None
        self.pipe, theirs = Pipe()
        settings = {
            "PYTHONPATH": python_path(),
            "TOKENIZERS_PARALLELISM": "false",  # a process each, rather than threads
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",  # it says that torch is missing, which is left out
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=of_child(os.environ | settings),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._send(job)

    def give(self, prefix: str, chunk: Chunk) -> None:
        self.chunk = chunk
        self._send((prefix, chunk.items))

    def take(self) -> tuple[Chunk, Made | Exception]:
        """What it was given, and what it made of it, or why it could not."""
        chunk = self.chunk
        assert chunk is not None
        try:
            answer: Made | Exception = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._died()
        self.chunk = None
        return chunk, answer

    def _send(self, message: object) -> None:
        try:
            self.pipe.send(message)
        except ConnectionError:
            self._died()

    def _died(self) -> None:
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        reason = "; the machine may be out of memory: set data.num_processes to fewer" if code == -9 else ""
        raise RunError(f"data: a tokenising process {how}{reason}; what is done is kept") from None


@contextmanager
def _processes(job: Job, number: int) -> Iterator[list[_Process]]:
    started: list[_Process] = []
    try:
        for _ in range(number):
            started.append(_Process(job))
        yield started
    except BaseException:
        for each in started:
            each.process.kill()
        raise
    finally:
        for each in started:
            each.pipe.close()
            each.process.wait()


class _Progress:
    """Says how fast it goes and how long it takes."""

    def __init__(self, unit: str) -> None:
        self.unit, self.live = unit, sys.stdout.isatty()
        self.began = self.told = time.monotonic()
        self.count = self.tokens = 0
        self.before, self.read, self.found = 0.0, 0.0, 0

    def kept(self, chunk: Chunk) -> None:
        self.found += 1
        self.before = max(self.before, chunk.read)

    def made(self, chunk: Chunk, made: Made) -> None:
        self.count += made.number
        self.tokens += made.tokens
        self.read = max(self.read, chunk.read)
        now = time.monotonic()
        if now - self.told >= (LIVE_INTERVAL if self.live else INTERVAL):
            self.told = now
            print(
                f"\r{self.line(now)}\x1b[K" if self.live else self.line(now), end="" if self.live else "\n", flush=True
            )

    def line(self, now: float) -> str:
        seconds = max(now - self.began, 1e-3)
        done, rest = self.read - self.before, 1 - self.read
        left = f", {durations.text(seconds / done * rest)} left" if done > 0 and rest > 0 else ""
        speed = f"{self.count / seconds:,.0f} {self.unit}/s, {self.tokens / seconds:,.0f} tokens/s"
        return f"data: tokenised {self.count:,} {self.unit}, {self.tokens:,} tokens, {speed}{left}"

    def end(self) -> None:
        if self.found:
            print(f"data: {self.found} finished shards of an earlier start were kept", flush=True)
        if self.live and self.told > self.began:
            print(f"\r{self.line(time.monotonic())}\x1b[K", flush=True)
