"""`python -m bridge.status runs/`: a table of the runs and sweep jobs below one or several directories.

With --watch again every few seconds, until Ctrl-C; with --json for programs. Exit codes: 0, or 2 when there is no run.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge.command_line import DONE, Parser, guarded
from bridge.config import durations
from bridge.errors import ConfigError, did_you_mean
from bridge.runs import read
from bridge.runs.read import Run

HEADER = ("run", "state", "step", "loss", "eval loss", "tokens/s", "last line", "eta", "by / error")
RIGHT = frozenset({"step", "loss", "eval loss", "tokens/s", "last line", "eta"})
STATE_COLORS = {"running": "36", "done": "32", "failed": "31", "invalid": "31", "died": "31", "stopped": "33"}  # ANSI
GAP = "  "
STATES = ("running", "pending", *sorted(read.ENDED))
SORTABLE = ("name", "state", "step", "loss", "eval_loss", "tokens_per_second", "age", "eta")  # fields of Run
AGE_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))  # the first of which there are at least two, else s


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m bridge.status`; returns the exit code."""
    return guarded(lambda: _command(arguments), only_prints=True)


class View(NamedTuple):
    """Which of the runs are shown, and in which order."""

    directories: list[Path]
    states: frozenset[str] | None = None  # None: all
    sort: str = "name"  # one of SORTABLE
    reverse: bool = False

    def collect(self) -> list[Run]:
        """The runs to show. ConfigError when there is none at all in the directories."""
        found = collect(self.directories)
        shown = [run for run in found if self.states is None or run.state in self.states]
        if self.sort == "name":  # as they come
            return shown[::-1] if self.reverse else shown
        known = [run for run in shown if _is_known(getattr(run, self.sort))]
        unknown = [run for run in shown if not _is_known(getattr(run, self.sort))]
        return sorted(known, key=lambda run: getattr(run, self.sort), reverse=self.reverse) + unknown


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _command(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    view = View([Path(directory) for directory in options.directories], options.state, options.sort, options.reverse)
    if options.watch:
        _watch(view, interval=options.interval)
    elif options.json:
        print(json.dumps([_plain(run) for run in view.collect()], indent=1))
    else:
        print(table(view.collect()))
    return DONE


def _plain(run: Run) -> dict[str, Any]:
    """What --json prints of a run. JSON has no NaN and no infinity: null."""
    values = run._asdict() | {"path": str(run.path)}
    values["age_seconds"], values["eta_seconds"] = values.pop("age"), values.pop("eta")
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def collect(directories: Sequence[Path]) -> list[Run]:
    """All runs of `directories`. With several, a run's name begins with its directory. ConfigError when none is found.

    A run below two of them is listed once.
    """
    found: dict[Path, Run] = {}
    for directory in directories:
        for run in read.find(directory):
            name = str(run.path) if len(directories) > 1 else run.name
            found.setdefault(run.path.resolve(), run._replace(name=name))
    if not found:
        raise ConfigError(f"{', '.join(map(str, directories))}: no run in it; give the directory that holds the runs")
    return list(found.values())


def table(found: Sequence[Run], *, width: int | None = None, color: bool = False) -> str:
    """One line per run below a header, and a line that counts the states.

    width: cut lines after this many characters; None: nothing is cut.
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
    lines.append(", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no run is in that state")
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
        read.one_line(run.name),
        run.state,
        step,
        number(run.loss),
        number(run.eval_loss),
        "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        "-" if run.age is None else age(run.age),
        "-" if run.eta is None else durations.text(run.eta),
        read.one_line(run.error or run.where or ""),
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


def _watch(view: View, *, interval: float) -> None:
    """Show the table again and again, in place on a terminal, below each other elsewhere."""
    on_terminal = sys.stdout.isatty()
    try:
        while True:
            print(_screen(view) if on_terminal else _page(view), flush=True)
            time.sleep(interval)
    except KeyboardInterrupt:
        print()


def _page(view: View) -> str:
    return f"{time.strftime('%H:%M:%S')}\n{table(view.collect())}\n"


def _screen(view: View) -> str:
    """The table for a terminal: cleared before it, cut to its size, the newest trouble not lost below the edge."""
    columns, lines = shutil.get_terminal_size()
    text = table(view.collect(), width=columns, color="NO_COLOR" not in os.environ).splitlines()
    room = lines - 3
    if len(text) > room:
        text = [*text[: room - 1], f"... {len(text) - room} more", text[-1]]
    return "\n".join(["\x1b[2J\x1b[H" + time.strftime("%H:%M:%S") + " (Ctrl-C ends)", *text])


def _parser() -> Parser:
    parser = Parser(prog="python -m bridge.status", description="A table of the runs and sweep jobs below directories.")
    parser.add_argument("directories", nargs="*", default=["runs"], help="directories to search (default: runs)")
    states, keys = ",".join(STATES), ", ".join(SORTABLE)
    parser.add_argument("--state", type=_states, metavar="STATE,...", help=f"only {states}")
    parser.add_argument(
        "--sort",
        choices=SORTABLE,
        default="name",
        metavar="BY",
        help=f"{keys}; lowest first, runs without a value last",
    )
    parser.add_argument("--reverse", action="store_true", help="greatest first")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    form.add_argument("--watch", action="store_true", help="refresh every few seconds, until Ctrl-C")
    parser.add_argument(
        "--interval", type=_seconds, default=5.0, help="seconds between refreshes with --watch (default: 5)"
    )
    return parser


def _states(text: str) -> frozenset[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STATES:
            hint = did_you_mean(name, STATES) or f"; the states are {', '.join(STATES)}"
            raise argparse.ArgumentTypeError(f"no state {name!r}{hint}")
    return frozenset(names)


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
