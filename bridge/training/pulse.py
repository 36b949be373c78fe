"""Where a rank is within its steps and since when: what a watchdog reads, and what the slowest rank is found by."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

# In the order in which a run, and then a step, goes through them. A rank that waits for others is further than those it
# waits for.
IMPORTING = "importing torch and megatron-core"
PREPARING = "preparing data"
BUILDING = "building the model"
STARTING = "starting"
READING = "reading data"
COMPUTING = "forward and backward"
REDUCING = "reducing gradients and updating"
EVALUATING = "evaluating"
SAVING = "saving"
REPORTING = "between two steps"
WORK_BETWEEN_STEPS = (STARTING, EVALUATING, SAVING)
BEFORE_STEPS = (IMPORTING, PREPARING, BUILDING, STARTING)
PHASES = (*BEFORE_STEPS, READING, COMPUTING, REDUCING, EVALUATING, SAVING, REPORTING)


class Place(NamedTuple):
    """A phase of a step. entered: time.monotonic()."""

    step: int
    phase: str
    entered: float


class Pulse:
    """The present place of this process. Written by the training thread, read by a watching one."""

    def __init__(self) -> None:
        self.place = Place(0, IMPORTING, time.monotonic())
        self.finished_steps = 0  # by this process
        self.steps: int | None = None  # of the run, once they are known
        # Since when it has been in one phase of a step, or of the work between two; None outside of the training loop.
        self.busy_since: float | None = None
        self.reading_seconds = 0.0

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Note that a phase of `step` (None: of the same one as before) begins."""
        now = time.monotonic()
        if self.place.phase == READING:
            self.reading_seconds += now - self.place.entered
        if self.busy_since is not None or phase == STARTING:
            self.busy_since = now
        self.place = Place(self.place.step if step is None else step, phase, now)

    def finish_step(self) -> None:
        """Note the end of a step."""
        self.finished_steps += 1
        self.enter(REPORTING)

    def leave(self) -> None:
        """Note the end of the training loop."""
        self.busy_since = None

    def reading(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`; while one is waited for, this rank is reading."""
        while True:
            self.enter(READING)
            batch = next(batches)
            self.enter(COMPUTING)
            yield batch
