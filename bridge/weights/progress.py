"""How far a conversion is: one live line on a terminal, a line every ten seconds elsewhere, and a summary."""

import sys
import time
from typing import TextIO

from bridge.weights.workers import peak_memory

PLAIN_INTERVAL = 10.0  # seconds between lines when nobody watches
LIVE_INTERVAL = 0.1
ERASE_LINE = "\r\x1b[2K"


class Progress:
    """Counts tensors and bytes of a stream of known size. `label` starts every line; `unit`: what is counted."""

    def __init__(
        self, label: str, *, num_tensors: int, num_bytes: int, stream: TextIO | None = None, unit: str = "tensors"
    ) -> None:
        self._label, self._unit = label, unit
        self._num_tensors, self._num_bytes = num_tensors, num_bytes
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._tensors = self._bytes = 0
        self._start = self._shown = time.monotonic()

    def add(self, num_bytes: int, *, name: str, count: int = 1) -> None:
        """One more tensor is done, or with count=0 a part of one."""
        self._tensors += count
        self._bytes += num_bytes
        now = time.monotonic()
        if now - self._shown < (LIVE_INTERVAL if self._live else PLAIN_INTERVAL):
            return
        self._shown = now
        line = self._line(now - self._start, name)
        if self._live:
            print(f"{ERASE_LINE}{line[:119]}", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)

    def _line(self, seconds: float, name: str) -> str:
        share = self._bytes / max(self._num_bytes, 1)
        rate = max(self._bytes, 1) / max(seconds, 1e-9)
        left = max(self._num_bytes - self._bytes, 0) / rate
        return (
            f"{self._label} {share:4.0%}  {self._tensors}/{self._num_tensors} {self._unit}  {_size(self._bytes)}  "
            f"{_size(rate)}/s  {_clock(left)} left  {name}"
        )

    def finish(self) -> str:
        """The summary: tensors, bytes, seconds, GB/s, peak memory of this process."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        if self._live:
            print(ERASE_LINE, end="", file=self._stream, flush=True)
        return (
            f"{self._label}: {self._tensors} {self._unit}, {_size(self._bytes)} in {seconds:.1f} s "
            f"({self._bytes / seconds / 1e9:.2f} GB/s), peak memory {_size(peak_memory())}"
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
