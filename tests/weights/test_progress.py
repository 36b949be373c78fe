"""One live line on a terminal, plain lines elsewhere."""

import io

from bridge.weights import progress
from bridge.weights.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, monkeypatch):
    clock = iter([0.0, 1.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = Progress("import", num_tensors=3, num_bytes=4 * 10**9, stream=stream)
    for index in range(3):
        shown.add(10**9, name=f"tensor{index}")
    return shown.finish()


def test_plain_lines_come_every_ten_seconds(monkeypatch):
    stream = io.StringIO()
    summary = run(stream, monkeypatch)
    assert stream.getvalue() == "import  50%  2/3 tensors  2.00 GB  0.10 GB/s  0:20 left  tensor1\n"
    assert summary.startswith("import: 3 tensors, 3.00 GB in 40.0 s (0.07 GB/s), peak memory ")


def test_a_terminal_gets_one_line_that_ends_erased(monkeypatch):
    stream = Terminal()
    run(stream, monkeypatch)
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().count(progress.ERASE_LINE) == 4
    assert stream.getvalue().endswith(progress.ERASE_LINE)
