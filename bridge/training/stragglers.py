"""Which rank is the slowest, and whether it is so in reading its data.

megatron-core's StragglerDetector wants CUDA and NVML, and opens a port.
"""

import os
import statistics
from typing import Any, NamedTuple

from megatron.core.utils import get_model_config

from bridge import parallel, platform
from bridge.training.pulse import REDUCING, Pulse


class Times(NamedTuple):
    """One rank's means over some steps. own: seconds until its gradients are ready to be reduced, reading included."""

    host: str
    own: float
    reading: float


class Stragglers:
    """Measures this rank's own time of every step, on the device and without a wait; compared once per interval.

    Between the start of a step and the reduction of its gradients, data-parallel ranks do not wait for each other.
    Ranks that hold one model together do, in the middle of the passes: there, only the time of reading tells.
    """

    def __init__(self, interval: int | None, pulse: Pulse, model: list[Any]) -> None:
        """`model`: this rank's chunks. From here on `pulse` knows when their gradients are to be reduced."""
        self.interval, self.pulse = interval, pulse
        self.start: Any = None
        self.marks: list[tuple[Any, Any]] = []
        config = get_model_config(model[0])
        finalize = config.finalize_model_grads_func

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.pulse.enter(REDUCING)
            if self.start is not None:
                self.marks.append((self.start, platform.mark()))
                self.start = None  # a step that is computed again is not measured again
            return finalize(*args, **kwargs)

        config.finalize_model_grads_func = noted

    def begin_step(self) -> None:
        """Note the start of a step."""
        if self.interval is not None:
            self.start = platform.mark()

    def report(self, step: int) -> str | None:
        """Every `interval` steps: one line on the steps since the last report. A collective call."""
        if self.interval is None or step % self.interval != 0 or not self.marks:
            return None
        platform.synchronize()
        num_steps = len(self.marks)
        own = sum(platform.seconds_between(first, last) for first, last in self.marks) / num_steps
        times = Times(os.uname().nodename, own, self.pulse.reading_seconds / num_steps)
        self.marks, self.pulse.reading_seconds = [], 0.0
        return line(step, [Times(*rank) for rank in parallel.all_gather(tuple(times))])


def line(step: int, ranks: list[Times]) -> str:
    """What is said about the times of all ranks."""
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].own)
    reader = max(range(len(ranks)), key=lambda rank: ranks[rank].reading)
    own = ranks[slowest].own
    ratio = own / max(statistics.median(rank.own for rank in ranks), 1e-9)
    return (
        f"step {step}: slowest is rank {slowest} ({ranks[slowest].host}), {own:.3g} s per step until its gradients are "
        f"ready, {ratio:.2f} times the median; rank {reader} ({ranks[reader].host}) reads longest, "
        f"{ranks[reader].reading:.3g} s per step"
    )
