"""A run's checkpoints, and what follows from each: a line on the console and in metrics.jsonl, an export."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bridge import parallel
from bridge.checkpoint import Position, Saved, Saver, files
from bridge.errors import RunError
from bridge.training import initial
from bridge.training.hf_exports import HfExports
from bridge.training.metrics import Report
from bridge.training.setup import Job
from bridge.weights import pointer
from bridge.weights.pointer import iteration_directory


class Saves:
    """Saves `job` when asked to; all ranks call the same methods."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report = job, report
        options = job.config.checkpoint
        self._exports = HfExports(job.config.run_dir) if options.save_hf and parallel.is_main() else None
        self._saver = Saver(
            job.checkpoints,
            keep_last=options.keep_last,
            asynchronous=options.async_save,
            write_timeout=options.write_timeout,
            in_use=self._exports.in_use if self._exports else tuple,
        )
        if self._exports is not None and (newest := pointer.read(job.checkpoints)) is not None:
            self._exports.catch_up(newest)
        self._step = job.progress.step
        if parallel.is_main():
            self._link_the_best()

    def save(self, progress: Position, *, is_best: bool = False) -> None:
        """Save the job as it stands at `progress`; with checkpoint.async_save the rest happens while training goes on.

        is_best: checkpoints/best is to link to it. Raises RunError on every rank, in one line, when this or the save
        before failed.
        """
        self._step = progress.step
        self._tell(self._saver.save(self._job.state, progress=progress, describe=self._describe, is_best=is_best))

    def poll(self, step: int) -> None:
        """After every step: see whether the pending save and export are done. Raises as `save`."""
        self._step = step
        self._tell(self._saver.poll())
        if self._exports is not None:
            self._exports.poll()

    def before_update(self) -> None:
        """Call it before an optimizer step: what the pending save has not copied yet must not change."""
        self._saver.wait_for_copies()

    def finish(self) -> None:
        """Wait for the pending save. Raises as `save`."""
        self._tell(self._saver.finish())

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Leave when the pending save is done; after an error of this rank it is discarded, as all are exports."""
        try:
            yield
            self.finish()
        except FloatingPointError:  # raised by all ranks together, about steps after the pending save
            with suppress(RunError):
                self.finish()
            self._abandon()
            raise
        except BaseException:
            self._saver.discard()
            self._abandon()
            raise

    def end_exports(self, *, done: bool) -> None:
        """Wait for the exports of a run that is done; those of one that stopped are left to its next start. No other
        rank need take part. Raises RunError if one failed."""
        if self._exports is None:
            return
        if not done:
            self._abandon()
            return
        self._exports.finish()
        self._saver.retain()
        self._exports.retain(self._job.checkpoints)
        if self._exports.failures:
            raise RunError(self._exports.failures[-1])

    def _link_the_best(self) -> None:
        """What a kill between a save and its link has left undone."""
        root, step = self._job.checkpoints, self._job.progress.best_step
        best = iteration_directory(root, iteration=step)
        if self._job.config.checkpoint.keep_best is not None and step and files.best(root) != best and best.is_dir():
            files.point_best_at(best)

    def _describe(self) -> None:
        initial.describe(self._job.checkpoints, self._job.config, tokenizer=self._job.data.prepared.tokenizer)

    def _tell(self, saved: list[Saved]) -> None:
        if not parallel.is_main():
            return
        for one in saved:
            print(f"saved {one.directory} (stall {one.stall:.2f} s)", flush=True)
            self._report.write({"step": self._step, "saved_step": one.step, "save_stall_seconds": one.stall})
            if self._exports is not None:
                self._exports.add(one.directory)
                self._exports.retain(self._job.checkpoints)

    def _abandon(self) -> None:
        if self._exports is not None:
            self._exports.abandon()
