"""megatron-core's torch_dist writer, made to end well: by a kill, a full disk or a failing rank, in the background too.

Each rank's files are written by forked processes, which end with the trainer and return their files' checksums.
"""

import gc
import os
import pickle
import queue
import signal
import tempfile
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from bridge.checkpoint import checksums, files
from bridge.checkpoint.agree import FAILURES, on_main, reason
from bridge.checkpoint.checksums import Checksum
from bridge.platform.processes import die_with_parent
from bridge.weights.shards import all_gather

FORKS = get_context("fork")
KILLED = "the process that wrote it was killed"


class Handover:
    """One value from a forked process to its parent, through an unnamed file: a pipe would fill up while the parent is
    busy, and megatron-core's queue is a server process that first imports torch, for 2 s."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, value: Any) -> None:
        """Leave `value`, the only one; the child's side."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """What was left, or a RuntimeError (not raised: so megatron-core passes it on to all ranks)."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError(KILLED)


class Strategy(TorchDistSaveShardedStrategy):
    """Writes one checkpoint. `complete` ends it, after `async_save`'s request was executed."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self._checksums = Handover()
        self._failure: BaseException | None = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        filesystem_async._results_queue = Handover()
        request = super().async_save(sharded_state_dict, checkpoint_dir)
        if request.async_fn is None:  # nothing to write on this rank
            self._checksums.put({})
            return request
        return request._replace(async_fn=partial(_write, *request.async_fn.args, checksums=self._checksums))

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        finish = writer.finish

        def finish_or_note(*arguments: Any) -> None:
            try:
                finish(*arguments)
            except FAILURES as error:  # on rank 0; raised from here it would leave the others in a broadcast
                self._failure = error

        writer.finish = finish_or_note
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)

    def complete(self, directory: Path) -> dict[str, Checksum]:
        """Write metadata.json and checksums.json: the files of all ranks lie in `directory`. All ranks call this.

        Returns the checksums of the files that the writers have flushed to disk.
        """
        written: dict[str, Checksum] = {}
        for part in all_gather(self._checksums.get_nowait()):
            written |= part

        def finish() -> None:
            if self._failure is not None:
                raise self._failure
            save_config(CheckpointingConfig(self.backend, self.version), str(directory))
            own = {file.name: checksums.of_file(file) for file in directory.iterdir() if file.name not in written}
            checksums.write(directory, written | own)

        on_main(finish)
        return written


class _CommonFile(TorchCommonSaveStrategy):
    """common.pt, written by rank 0; its failure reaches the ranks that would wait for rank 0 in the next collective."""

    def save_common(self, common_state_dict: Any, checkpoint_dir: str | Path) -> None:
        on_main(partial(super().save_common, common_state_dict, checkpoint_dir))


register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _CommonFile("torch", 1))


def in_background(request: AsyncRequest) -> AsyncRequest:
    """`request` for megatron-core's queue, which forks a process for it."""
    if request.async_fn is None:
        return request
    return request._replace(async_fn=partial(_forked, os.getpid(), request.async_fn))


def _write(
    transforms: list[Any],
    use_msc: bool,
    rank: int,
    buckets: Sequence[Any],
    results: Handover,
    *,
    checksums: Handover,
) -> None:
    """Write each bucket into its file, by a process each, and hand over megatron-core's results and the checksums.

    As megatron-core's `write_preloaded_data_multiproc`, which waits forever for a process that was killed.
    """
    try:
        parts = _write_all(transforms, use_msc, buckets)
    except FAILURES as error:
        results.put(RuntimeError(reason(error)))
        return
    checksums.put({Path(bucket[0]).name: checksum for bucket, (_, checksum) in zip(buckets, parts, strict=True)})
    results.put({index: written for index, (written, _) in enumerate(parts)})


def _write_all(transforms: list[Any], use_msc: bool, buckets: Sequence[Any]) -> list[Any]:
    handovers = [Handover() for _ in buckets]
    writers = []
    for bucket, handover in zip(buckets, handovers, strict=True):
        arguments = (os.getpid(), _write_file, transforms, use_msc, bucket, handover)
        writers.append(FORKS.Process(target=_forked, args=arguments))
        writers[-1].start()
    for writer in writers:
        writer.join()
    parts = [handover.get_nowait() for handover in handovers]
    for part in parts:
        if isinstance(part, Exception):
            raise part
    return parts


def _write_file(transforms: list[Any], use_msc: bool, bucket: Any, handover: Handover) -> None:
    output: Any = queue.SimpleQueue()
    running: Any = queue.Queue()
    running.put(0)  # what megatron-core's function takes out when it is done
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, output, running, use_fsync=True, use_msc=use_msc)
    _, written = output.get()
    if isinstance(written, Exception):
        handover.put(RuntimeError(reason(written)))
        return
    file = Path(bucket[0])
    files.flush(file)  # megatron-core flushes before the last of Python's buffer is written
    handover.put((written, checksums.of_file(file)))


def _forked(parent: int, work: Any, *arguments: Any) -> None:
    """`work(*arguments)` in a process forked by `parent`: it ends with `parent`, and by no signal meant for that."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent(parent)
    gc.disable()  # a collection would run the destructors of the parent's CUDA objects
    work(*arguments)
