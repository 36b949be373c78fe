"""On a terminal, one line below the output that tells what a run is doing; it is overwritten and goes into no log.

The line is written by a thread that reads the pulse, straight to the terminal: what the process prints takes another
way, through `tee`. The cursor stays at its beginning, so that whatever comes next begins there; what Python prints
erases it first.
"""

import fcntl
import os
import select
import sys
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from bridge.config import durations
from bridge.config.run_config import RunConfig
from bridge.training.console import TimeLeft
from bridge.training.pulse import BEFORE_STEPS, Pulse

INTERVAL = 0.5  # seconds between two looks at the pulse
QUIET = 0.2  # seconds since the last print, in which tee has written it
ERASE = "\x1b[2K"


class LiveLine:
    """The line. is_quiet: whether all that was printed has left for the terminal."""

    def __init__(self, terminal: int, *, is_quiet: Callable[[], bool]) -> None:
        self._terminal, self._is_quiet = terminal, is_quiet
        self._lock = threading.Lock()
        self._printed = 0.0  # time.monotonic() of the last print
        self._is_shown = False

    def show(self, text: str) -> None:
        """Show `text`, cut to the terminal's width, unless something has just been printed."""
        with self._lock:
            if time.monotonic() - self._printed < QUIET or not self._is_quiet():
                return
            self._write(f"\r{ERASE}{text[: self._columns() - 1]}\r")
            self._is_shown = True

    def make_room(self) -> None:
        """Erase the line: something is about to be printed."""
        with self._lock:
            self._printed = time.monotonic()
            if self._is_shown:
                self._write(f"\r{ERASE}")
                self._is_shown = False

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a terminal that was closed
            if select.select([], [self._terminal], [], 0)[1]:  # else Ctrl-S holds it, and would hold the run
                os.write(self._terminal, text.encode())

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._terminal).columns or 80
        except OSError:
            return 80


class _Yielding:
    """A text stream that makes room before it writes."""

    def __init__(self, stream: TextIO, line: LiveLine) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        self._line.make_room()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def following(pulse: Pulse, config: RunConfig, *, terminal: int | None) -> Iterator[None]:
    """While the body runs, show where `pulse` is on the file descriptor `terminal`; None: nowhere.

    stdout is the pipe to tee then.
    """
    if terminal is None or not os.isatty(terminal) or os.environ.get("TERM", "dumb") == "dumb":
        yield
        return
    line, done = LiveLine(terminal, is_quiet=lambda: unread(1) == 0), threading.Event()
    streams = sys.stdout, sys.stderr
    thread = threading.Thread(target=_follow, args=(pulse, config, line, done), daemon=True, name="live line")
    sys.stdout, sys.stderr = _Yielding(sys.stdout, line), _Yielding(sys.stderr, line)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        line.make_room()
        sys.stdout, sys.stderr = streams


def unread(pipe: int) -> int:
    """Bytes in a pipe that its reader has not taken yet."""
    count = array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def _follow(pulse: Pulse, config: RunConfig, line: LiveLine, done: threading.Event) -> None:
    time_left: TimeLeft | None = None
    while not done.wait(INTERVAL):
        if time_left is None and pulse.steps is not None:
            time_left = TimeLeft(pulse.steps)
        line.show(f"{config.name}: {described(pulse, time_left)}")


def described(pulse: Pulse, time_left: TimeLeft | None) -> str:
    """`step 17/300, 3m20s left`; before the first step, and in what takes long between two, also for how long."""
    step, phase, entered = pulse.place
    since = f"{phase}, {durations.text(time.monotonic() - entered)}"
    if phase in BEFORE_STEPS or not step or time_left is None:
        return since
    left = time_left.after(step) if pulse.finished_steps else None
    parts = [f"step {step}/{time_left.steps}"]
    if time.monotonic() - entered > 2 * INTERVAL:
        parts.append(since)
    if left is not None and step < time_left.steps:
        parts.append(f"{durations.text(left)} left")
    return ", ".join(parts)
