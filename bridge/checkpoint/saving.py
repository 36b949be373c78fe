"""Saving: all ranks write a megatron-core torch_dist folder, then rank 0 makes it the latest."""

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from bridge import parallel
from bridge.checkpoint import content, files
from bridge.checkpoint.content import METADATA, Progress, Trainable
from bridge.weights.locate import iteration_directory


def save(root: Path, state: Trainable, *, progress: Progress, keep_last: int | None = None) -> Path:
    """Write iteration `progress.step` below `root` and make it the latest. All ranks call this; returns the directory.

    A kill at any moment leaves the previous checkpoint the latest, or this one, whole.
    """
    final = iteration_directory(root, iteration=progress.step)
    unfinished = root / f"{files.SAVING}{final.name}"
    if parallel.is_main():
        root.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(root)
        unfinished.mkdir()
    parallel.barrier()
    _write(unfinished, content.to_save(state, progress))
    if parallel.is_main():
        files.publish(unfinished, final)
        if keep_last is not None:
            files.retain(final, keep=keep_last)
    parallel.barrier()
    return final


def save_weights(directory: Path, model: Sequence[Any]) -> None:
    """Write the weights of `model` (this rank's chunks, wrapped or not), and nothing else, as a torch_dist folder into
    `directory`, which is empty. All ranks call this."""
    _write(directory, content.weights(model))


def _write(directory: Path, state: dict[str, Any]) -> None:
    # megatron-core's own queue lives in a process that first imports torch (2 s); a synchronous save needs no other.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(directory), content_metadata=METADATA)
    parallel.barrier()
