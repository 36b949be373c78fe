"""Reasons to save and leave before the last step: a signal, a time limit, a step interval. All ranks agree on it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from bridge.config import durations
from bridge.config.schema import Train
from bridge.errors import Stopped

# What schedulers, torch elastic and people send: Slurm's --signal is often USR1 or USR2, Ctrl-C is INT.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# What the ranks agree on is the largest of these and the signals' own numbers, which are all above.
NO_REASON, TIME_LIMIT = 0, 1


class Stop:
    """Watches for a reason to stop. `started` is the time.monotonic() from which the time limit counts."""

    def __init__(self, train: Train, *, started: float) -> None:
        self.train = train
        self.received: signal.Signals | None = None
        self.at_once = False
        self.deadline = None if train.exit_after is None else started + durations.seconds(train.exit_after)
        self.host_group: dist.ProcessGroup | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGNALS instead of dying from them, so that a save is never cut short. A second SIGINT interrupts."""

        def note(number: int, _: FrameType | None) -> None:
            if number == self.received == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = signal.Signals(number)
            if self.at_once:
                raise Stopped

        # By SIGUSR2 submitit learns of the time limit: its handler, or what part of a launcher wraps it, stays.
        taken = [n for n in SIGNALS if n != signal.SIGUSR2 or signal.getsignal(n) == signal.SIG_DFL]
        previous = {number: signal.signal(number, note) for number in taken}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped: for long work that has nothing to save and can be broken off anywhere."""
        if self.received is not None:
            raise Stopped
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def meet(self) -> None:
        """Connect the ranks that are to agree. A collective call, before anything can fail on one of them alone: who
        connects to a rank that has ended waits for half an hour, who has been connected learns of its end at once."""
        if dist.get_world_size() > 1:
            # Over gloo, on the host: asking the device would wait for all work queued on it, every step.
            self.host_group = dist.new_group(backend="gloo")

    def signalled(self) -> str | None:
        """The signal to stop that any rank has received so far, the same on every rank, or None. A collective call."""
        agreed = self._largest_of_all_ranks(NO_REASON if self.received is None else self.received.value)
        return None if agreed == NO_REASON else signal.Signals(agreed).name

    def reason(self, *, step: int) -> str | None:
        """Why to stop after `step`, the same answer on every rank, or None. A collective call."""
        if self.train.exit_interval is not None and step % self.train.exit_interval == 0:
            return f"train.exit_interval={self.train.exit_interval}"
        mine = NO_REASON
        if self.deadline is not None and time.monotonic() >= self.deadline:
            mine = TIME_LIMIT
        if self.received is not None:
            mine = self.received.value
        agreed = self._largest_of_all_ranks(mine)
        if agreed == NO_REASON:
            return None
        return f"train.exit_after={self.train.exit_after}" if agreed == TIME_LIMIT else signal.Signals(agreed).name

    def _largest_of_all_ranks(self, value: int) -> int:
        if dist.get_world_size() == 1:
            return value
        if self.host_group is None:
            self.meet()
        flag = torch.tensor([value])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(flag.item())
