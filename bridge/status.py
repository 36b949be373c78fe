"""`python -m bridge.status runs/`: a table of the runs and sweep jobs below one or several directories.

With --watch again every few seconds, until Ctrl-C. Exit codes: 0, or 2 when there is nothing to show.
"""

import argparse
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bridge import runs
from bridge.command_line import DONE, Parser, guarded
from bridge.errors import ConfigError
from bridge.runs import Run

HEADER = ("run", "state", "step", "loss", "eval loss", "tokens/s", "last line", "by / error")
RIGHT = frozenset({"step", "loss", "eval loss", "tokens/s", "last line"})
STATE_COLORS = {"running": "36", "done": "32", "failed": "31", "invalid": "31", "died": "31", "stopped": "33"}  # ANSI
GAP = "  "
AGE_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))  # the first of which there are at least two, else s


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m bridge.status`; returns the exit code."""
    return guarded(lambda: _command(arguments), only_prints=True)


def _command(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    directories = [Path(directory) for directory in options.directories]
    if options.watch:
        _watch(directories, interval=options.interval)
    else:
        print(table(collect(directories)))
    return DONE


def collect(directories: Sequence[Path]) -> list[Run]:
    """All runs of `directories`. With several, a run's name begins with its directory. ConfigError when none is found.

    A run below two of them is listed once.
    """
    found: dict[Path, Run] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: no such directory; give the one that holds the runs, such as runs/")
        for run in runs.find(directory):
            name = str(run.path) if len(directories) > 1 else run.name
            found.setdefault(run.path.resolve(), run._replace(name=name))
    if not found:
        raise ConfigError(f"{', '.join(map(str, directories))}: no run in it; give the directory that holds the runs")
    return list(found.values())


def table(found: Sequence[Run], *, width: int | None = None, color: bool = False) -> str:
    """One line per run below a header, and a line that counts the states.

    width: cut lines after so many characters; None: nothing is cut.
    """
    rows = [HEADER, *(_cells(run) for run in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(size) if title in RIGHT else cell.ljust(size)
            for cell, size, title in zip(row, widths, HEADER, strict=True)
        ]
        lines.append(_painted(GAP.join(cells).rstrip()[:width], row[1], cells[0], color=color))
    states = Counter(run.state for run in found)
    lines.append(", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    return "\n".join(lines)


def _painted(line: str, state: str, first: str, *, color: bool) -> str:
    begin = len(first) + len(GAP)
    end = begin + len(state)
    if not color or state not in STATE_COLORS:
        return line
    return f"{line[:begin]}\x1b[{STATE_COLORS[state]}m{line[begin:end]}\x1b[0m{line[end:]}"


def _cells(run: Run) -> tuple[str, ...]:
    step = "-" if run.step is None else f"{run.step}/{run.steps}" if run.steps else str(run.step)
    return (
        runs.one_line(run.name),
        run.state,
        step,
        number(run.loss),
        number(run.eval_loss),
        "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        "-" if run.age is None else age(run.age),
        runs.one_line(run.error or run.where or ""),
    )


def number(value: float | None) -> str:
    """A loss in the table: four digits after the point, `nan` and `inf` as such."""
    return "-" if value is None else f"{value:.4f}" if math.isfinite(value) and abs(value) < 1e6 else f"{value:.4g}"


def age(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h`, `9 d`."""
    for unit, length in AGE_UNITS:
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _watch(directories: Sequence[Path], *, interval: float) -> None:
    """Show the table again and again, in place on a terminal, below each other elsewhere."""
    on_terminal = sys.stdout.isatty()
    try:
        while True:
            print(_screen(directories) if on_terminal else _page(directories), flush=True)
            time.sleep(interval)
    except KeyboardInterrupt:
        print()


def _page(directories: Sequence[Path]) -> str:
    return f"{time.strftime('%H:%M:%S')}\n{table(collect(directories))}\n"


def _screen(directories: Sequence[Path]) -> str:
    """The table for a terminal: cleared before it, cut to its size, the newest trouble not lost below the edge."""
    columns, lines = shutil.get_terminal_size()
    text = table(collect(directories), width=columns, color="NO_COLOR" not in os.environ).splitlines()
    room = lines - 3
    if len(text) > room:
        text = [*text[: room - 1], f"... {len(text) - room} more", text[-1]]
    return "\n".join(["\x1b[2J\x1b[H" + time.strftime("%H:%M:%S") + " (Ctrl-C ends)", *text])


def _parser() -> Parser:
    parser = Parser(prog="python -m bridge.status", description="A table of the runs and sweep jobs below directories.")
    parser.add_argument("directories", nargs="*", default=["runs"], help="where to look (runs)")
    parser.add_argument("--watch", action="store_true", help="again every few seconds, until Ctrl-C")
    parser.add_argument("--interval", type=_seconds, default=5.0, help="seconds between two looks with --watch (5)")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 86400 seconds")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
