"""How far a conversion is: one live line on a terminal, a line every ten seconds elsewhere, and a summary."""

import resource
import sys
import time
from typing import TextIO

PLAIN_INTERVAL = 10.0  # seconds between lines when nobody watches
LIVE_INTERVAL = 0.1
ERASE_LINE = "\r\x1b[2K"


class Progress:
    """Counts tensors and bytes of a stream of known size. `label` starts every line."""

    def __init__(self, label: str, *, num_tensors: int, num_bytes: int, stream: TextIO | None = None) -> None:
        self._label = label
        self._num_tensors, self._num_bytes = num_tensors, num_bytes
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._tensors = self._bytes = 0
        self._start = self._shown = time.monotonic()

    def add(self, num_bytes: int, *, name: str) -> None:
        """One more tensor is done."""
        self._tensors += 1
        self._bytes += num_bytes
        now = time.monotonic()
        if now - self._shown < (LIVE_INTERVAL if self._live else PLAIN_INTERVAL):
            return
        self._shown = now
        share = self._bytes / max(self._num_bytes, 1)
        line = f"{self._label} {share:4.0%}  {self._tensors}/{self._num_tensors} tensors  {_gb(self._bytes)}  {name}"
        if self._live:
            print(f"{ERASE_LINE}{line[:119]}", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)

    def finish(self) -> str:
        """The summary: tensors, bytes, seconds, GB/s, peak memory of this process."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        if self._live:
            print(ERASE_LINE, end="", file=self._stream, flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        return (
            f"{self._label}: {self._tensors} tensors, {_gb(self._bytes)} in {seconds:.1f} s "
            f"({self._bytes / seconds / 1e9:.2f} GB/s), peak memory {_gb(peak)}"
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
