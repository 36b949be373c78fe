"""Texts become shards of tokens, by several processes. A shard that is there is not made again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import NamedTuple

from bridge.config import durations
from bridge.data.encode.tokenizer_process import Job
from bridge.data.samples import bin_idx
from bridge.errors import RunError
from bridge.processes import of_child, python_path

SHARDS = 64  # of a corpus, unless they were too small or too large for that
SMALLEST, LARGEST = 1 << 18, 1 << 24  # characters of a shard
INTERVAL = 10.0  # seconds between two lines on how far it is; on a terminal it is one line
LIVE_INTERVAL = 0.5
MODULE = "bridge.data.encode.tokenizer_process"


def num_chunks(size: int) -> int:
    """About how many chunks a corpus of `size` bytes has, at least one."""
    return max(1, size // _target(size))


def _target(size: int) -> int:
    return min(max(size // SHARDS, SMALLEST), LARGEST)


class Chunk(NamedTuple):
    number: int
    texts: list[str]
    read: float  # share of the input that is read with it


def chunks(texts: Iterable[str], *, size: int, share_read: Callable[[], float]) -> Iterator[Chunk]:
    """`texts` in pieces that depend on nothing but themselves and the corpus's `size` in bytes."""
    target = _target(size)
    number, held, characters = 0, list[str](), 0
    for text in texts:
        held.append(text)
        characters += len(text)
        if characters >= target:
            yield Chunk(number, held, share_read())
            number, held, characters = number + 1, [], 0
    if held:
        yield Chunk(number, held, share_read())


def write(directory: Path, found: Iterable[Chunk], *, job: Job, num_processes: int) -> list[str]:
    """The prefixes of the shards below `directory`, in the order of the chunks; those that are missing are made."""
    progress = _Progress()
    prefixes: list[str] = []
    with _processes(job, num_processes) as free:
        idle: list[_Process] = list(free)
        for chunk in found:
            prefix = str(directory / f"{chunk.number:06d}")
            prefixes.append(prefix)
            if bin_idx.is_whole(prefix):
                progress.kept(chunk)
                continue
            if not idle:
                idle += _finished(free, progress)
            process = idle.pop()
            process.give(prefix, chunk)
        while any(process.chunk for process in free):
            _finished(free, progress)
    progress.end()
    return prefixes


class _Process:
    """One tokenising process, and what it works on."""

    def __init__(self, job: Job) -> None:
        self.chunk: Chunk | None = None
        self.pipe, theirs = Pipe()
        settings = {
            "PYTHONPATH": python_path(),
            "TOKENIZERS_PARALLELISM": "false",  # a process each, rather than threads
            "OMP_NUM_THREADS": "1",
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
        self._send((prefix, chunk.texts))

    def take(self) -> tuple[Chunk, int]:
        """What it has done, and how many tokens that is."""
        chunk = self.chunk
        assert chunk is not None
        try:
            num_tokens: int = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._died()
        self.chunk = None
        return chunk, num_tokens

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


def _finished(processes: list[_Process], progress: "_Progress") -> list[_Process]:
    """Those that have just finished what they worked on."""
    busy = {process.pipe: process for process in processes if process.chunk}
    done = [busy[pipe] for pipe in connection.wait(list(busy))]  # type: ignore[index]
    for process in done:
        progress.made(*process.take())
    return done


class _Progress:
    """Says how fast it goes and how long it takes."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.began = self.told = time.monotonic()
        self.documents = self.tokens = 0
        self.before, self.read, self.found = 0.0, 0.0, 0

    def kept(self, chunk: Chunk) -> None:
        self.found += 1
        self.before = max(self.before, chunk.read)

    def made(self, chunk: Chunk, num_tokens: int) -> None:
        self.documents += len(chunk.texts)
        self.tokens += num_tokens
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
        speed = f"{self.documents / seconds:,.0f} docs/s, {self.tokens / seconds:,.0f} tokens/s"
        return f"data: tokenised {self.documents:,} documents, {self.tokens:,} tokens, {speed}{left}"

    def end(self) -> None:
        if self.found:
            print(f"data: {self.found} finished shards of an earlier start were kept", flush=True)
        if self.live and self.told > self.began:
            print(f"\r{self.line(time.monotonic())}\x1b[K", flush=True)
