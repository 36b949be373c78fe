"""Threads that write the files of one rank's share of a checkpoint, one thread a file.

Not forked processes: a fork of a process with threads can hang for ever before its first line, in a lock that another
thread held. Copying, writing and checksums release the interpreter's lock, so threads are as fast. A process that ends
waits for none of them.
"""

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from bridge.checkpoint import checksums, files
from bridge.checkpoint.agree import FAILURES
from bridge.checkpoint.checksums import Checksum
from bridge.config import durations

# Seconds in which a writer that is late may show that only the whole process had stood still, or end when told to.
GRACE = 5.0

# megatron-core's (path, name, ([(item, bytes)], [(item, tensor)])): what goes into one file.
Bucket = tuple[str, str, tuple[list[Any], list[Any]]]

# Without megatron-core's decorator, which switches the garbage collector off: of the whole process, here.
_write_bucket = FileSystemWriterAsync.write_preloaded_data.__wrapped__


class Written(NamedTuple):
    """A file that is on disk. results: megatron-core's, for the checkpoint's metadata."""

    name: str
    results: list[Any]
    checksum: Checksum


class Writer(threading.Thread):
    """Copies those tensors of `bucket` whose storage is in `to_copy`, then writes all; each is let go when written.

    copied: set when nothing but the copies is still read. moved: the time.monotonic() of the last sign of life.
    """

    def __init__(self, bucket: Bucket, *, to_copy: Collection[int], transforms: list[Any], use_msc: bool) -> None:
        super().__init__(name="checkpoint_writer", daemon=True)
        self.copied = threading.Event()
        self.moved = time.monotonic()
        self.written: Written | None = None
        self.error: BaseException | None = None
        self._bucket, self._to_copy = bucket, to_copy
        self._options = (transforms, use_msc)
        self._abandoned = False

    def run(self) -> None:
        """The body of the thread; how it ended is in `written` or `error`."""
        try:
            copy_tensors(self._bucket, self._to_copy)
            self.copied.set()
            self.written = write_file(self._bucket, *self._options, advance=self._advance)
        except FAILURES as error:
            self.error = error
        finally:
            self.copied.set()
            for items in self._bucket[2]:
                items.clear()

    def abandon(self) -> None:
        """Have the thread end before the next tensor. Returns at once."""
        self._abandoned = True

    def _advance(self, *_: Any) -> None:
        if self._abandoned:
            raise RuntimeError("the save was abandoned")
        self.moved = time.monotonic()


class Writers:
    """The writers of one save. timeout: how long one may get no further, as 30m; None: for ever."""

    def __init__(self, *, timeout: str | None) -> None:
        self._writers: Sequence[Writer] = ()
        self._timeout, self._seconds = timeout, None if timeout is None else durations.seconds(timeout)

    def start(self, writers: Sequence[Writer]) -> None:
        """Have them write."""
        self._writers = writers
        for writer in writers:
            writer.start()

    def busy(self) -> bool:
        """Whether one is still writing and not to be given up."""
        return any(writer.is_alive() and not self._is_late(writer) for writer in self._writers)

    def wait(self, seconds: float) -> None:
        """Wait until none is at work, at most `seconds`."""
        deadline = time.monotonic() + seconds
        for writer in self._writers:
            writer.join(max(0.0, deadline - time.monotonic()))

    def wait_for_copies(self) -> None:
        """Wait until they read nothing that others may change."""
        for writer in self._writers:
            writer.copied.wait()

    def written(self) -> list[Written]:
        """The files, when none is `busy`. Raises what the first writer that failed has raised, or TimeoutError."""
        files_on_disk = []
        for writer in self._writers:
            if writer.is_alive():
                raise TimeoutError(f"a writer made no progress within checkpoint.write_timeout={self._timeout}")
            if writer.written is None:
                raise writer.error or RuntimeError("a writer ended without an error message")
            files_on_disk.append(writer.written)
        return files_on_disk

    def abandon(self) -> None:
        """End them, in the middle of their files. One that hangs is left behind."""
        for writer in self._writers:
            writer.abandon()
        self.wait(GRACE)

    def _is_late(self, writer: Writer) -> bool:
        moved = writer.moved
        if self._seconds is None or time.monotonic() - moved <= self._seconds:
            return False
        writer.join(min(GRACE, self._seconds))  # of a process that was stopped, all writers look late at first
        return writer.is_alive() and writer.moved == moved


def copy_tensors(bucket: Bucket, storages: Collection[int]) -> None:
    """Put copies of the tensors that lie in `storages` (addresses) in their place in `bucket`."""
    tensors = bucket[2][1]
    for number, (item, tensor) in enumerate(tensors):
        if tensor.untyped_storage().data_ptr() in storages:
            tensors[number] = (item, tensor.clone())


def write_file(bucket: Bucket, transforms: list[Any], use_msc: bool, *, advance: Callable[..., None]) -> Written:
    """Write `bucket`, emptying it, flush the file to disk and read it back for its checksum.

    advance: called before each tensor and after each block read; what it raises ends the writing.
    """
    path, name, (plain, tensors) = bucket
    output: Any = queue.SimpleQueue()
    running: Any = queue.Queue()
    running.put(0)  # what megatron-core's function takes out when it is done
    contents = (_taken(plain, advance), _taken(tensors, advance))
    _write_bucket(transforms, 0, (path, name, contents), output, running, use_fsync=True, use_msc=use_msc)
    _, results = output.get()
    if isinstance(results, Exception):
        raise results
    files.flush(Path(path))  # megatron-core flushes before the last of Python's buffer is written
    return Written(name, results, checksums.of_file(Path(path), advance=advance))


def _taken(items: list[Any], advance: Callable[..., None]) -> Iterator[Any]:
    items.reverse()
    while items:
        advance()
        yield items.pop()
