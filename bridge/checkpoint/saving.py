"""Saving: all ranks write a megatron-core torch_dist folder, at once or in the background, then rank 0 makes it the
latest. A failure on any rank is raised on all."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint import CheckpointException

from bridge import parallel
from bridge.checkpoint import content, files
from bridge.checkpoint.agree import FAILURES, on_main, reason, together
from bridge.checkpoint.content import Position, Trainable
from bridge.checkpoint.writing import Writing
from bridge.errors import BridgeError, RunError
from bridge.weights import pointer
from bridge.weights.plain_objects import check_plain
from bridge.weights.pointer import iteration_directory


class Saved(NamedTuple):
    """A checkpoint that is on disk and the latest. stall: seconds that training waited for it, on this rank."""

    directory: Path
    step: int
    stall: float


@dataclass
class _Pending:
    final: Path
    step: int
    is_best: bool
    writing: Writing | None = None
    stall: float = 0.0

    @property
    def unfinished(self) -> Path:
        return self.final.with_name(f"{files.SAVING}{self.final.name}")

    @contextmanager
    def stalling(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stall += time.perf_counter() - started


class Saver:
    """Saves a run's checkpoints below `root`, one at a time: every method but `discard` is called by all ranks.

    A kill at any moment leaves the previous checkpoint the latest, or the new one, whole. asynchronous: threads write
    while training goes on; `wait_for_copies` comes before every update of the weights. keep_last: how many iterations
    stay; those named by `in_use()` (rank 0 asks) are spared. write_timeout: how long a writer may get no further, as
    30m. A save that fails raises RunError, in one line, on every rank.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int | None = None,
        asynchronous: bool = False,
        write_timeout: str | None = None,
        in_use: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.root, self.keep_last, self.in_use = root, keep_last, in_use
        self.asynchronous, self.write_timeout = asynchronous, write_timeout
        self._pending: _Pending | None = None
        self._has_read_back = False

    def save(
        self,
        state: Trainable,
        *,
        progress: Position,
        describe: Callable[[], None] = lambda: None,
        is_best: bool = False,
    ) -> list[Saved]:
        """Save iteration `progress.step`; an earlier save that is still being written is waited for.

        describe: what rank 0 writes below `root` before the first checkpoint. is_best: ROOT/best is to link to it.
        Returns the saves that are done by now.
        """
        saved = self.finish()
        final = iteration_directory(self.root, iteration=progress.step)
        self._pending = pending = _Pending(final, progress.step, is_best)
        with self._named(pending), pending.stalling():
            on_main(lambda: self._open(pending, describe))
            together(lambda: _check_shared(pending.unfinished))
            pending.writing = Writing(
                content.to_save(state, progress),
                pending.unfinished,
                in_background=self.asynchronous,
                write_timeout=self.write_timeout,
            )
        return saved if self.asynchronous else [*saved, *self.finish()]

    def wait_for_copies(self) -> None:
        """Wait until the pending save reads no weights and no optimizer state any more: call it before these change."""
        if self._pending is not None and self._pending.writing is not None:
            with self._pending.stalling():
                self._pending.writing.wait_for_copies()

    def poll(self) -> list[Saved]:
        """The pending save, if all ranks' writers are done with it; does not wait."""
        return self._finalize(blocking=False)

    def finish(self) -> list[Saved]:
        """The pending save, if there is one, when it is done."""
        return self._finalize(blocking=True)

    def discard(self) -> None:
        """End this rank's writers of the pending save, which never gets its name. For a run that failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.writing is not None:
            pending.writing.abandon()
        if parallel.is_main():
            shutil.rmtree(pending.unfinished, ignore_errors=True)

    def retain(self) -> None:
        """Remove the iterations beyond `keep_last`, but not the best; rank 0."""
        if self.keep_last is not None and (newest := pointer.read(self.root)) is not None:
            files.retain(newest, keep=self.keep_last, spare=self.in_use())

    def _finalize(self, *, blocking: bool) -> list[Saved]:
        pending = self._pending
        if pending is None or pending.writing is None:
            return []
        with self._named(pending), pending.stalling():
            if blocking:
                pending.writing.wait()
            elif not pending.writing.is_done():
                return []
            self._publish(pending, pending.writing.finish())
            self._pending = None
        return [Saved(pending.final, pending.step, pending.stall)]

    def _open(self, pending: _Pending, describe: Callable[[], None]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.root)
        pending.unfinished.mkdir()
        describe()

    def _publish(self, pending: _Pending, flushed: Collection[str]) -> None:
        """`latest` moves when everything is on disk; what is too old goes after that."""
        if not self._has_read_back:
            together(lambda: _read_back(pending.unfinished))
            self._has_read_back = True
        on_main(lambda: files.publish(pending.unfinished, pending.final, flushed=flushed))
        if pending.is_best:
            on_main(lambda: files.point_best_at(pending.final))
        on_main(self.retain)

    @contextmanager
    def _named(self, pending: _Pending) -> Iterator[None]:
        """What goes wrong in a save, as one line with its directory; the files written so far are removed."""
        try:
            yield
        except BridgeError:
            self.discard()
            raise
        except FAILURES as error:
            self.discard()
            latest = pointer.read(self.root)
            kept = "there is no earlier checkpoint" if latest is None else f"{latest.name} stays the latest checkpoint"
            why = reason(error)
            if isinstance(error, CheckpointException):  # on all ranks, but only rank 0 has been told why
                why = next(filter(None, parallel.all_gather(error.failures and why)), why)
            raise RunError(f"{pending.final}: could not be saved ({why}); {kept}") from error


def save_weights(directory: Path, model: Sequence[Any]) -> None:
    """Write the weights of `model` (this rank's chunks, wrapped or not), and nothing else, as a torch_dist folder into
    `directory`, which is empty. All ranks call this."""
    writing = Writing(content.weights(model), directory)
    writing.wait()
    writing.finish()


def _read_back(directory: Path) -> None:
    """What a resume would refuse ends the run at its first checkpoint, not when days depend on the last."""
    try:
        check_plain(directory, share=(parallel.rank(), parallel.size()))
    except BridgeError as error:
        raise RunError(str(error)) from error


def _check_shared(directory: Path) -> None:
    if not directory.is_dir():
        raise RunError(
            f"{directory} was made by rank 0, but rank {parallel.rank()} does not see it; set runs_dir to a "
            "directory that all nodes share"
        )
