"""`python -m bridge.sweep_report DIR`: one HTML page on the jobs of a sweep, or on any directory of runs.

Loss curves, what differed between the jobs, best first. The page (sweep_report.html and the data in it) needs nothing
from elsewhere: it can be mailed or kept. Exit codes: 0, or 2 when there is nothing to report or no place to write.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge.command_line import DONE, Parser, guarded
from bridge.errors import ConfigError
from bridge.files import write_text
from bridge.runs import read
from bridge.runs.read import Run

PAGE = Path(__file__).with_suffix(".html")
PLACE = "/*DATA*/"  # in PAGE, where the data goes
NAME = "report.html"
MAX_POINTS = 800  # per curve: more than the pixels of a chart; longer runs show means of several steps
UNIMPORTANT = frozenset({"name", "runs_dir"})  # overrides that tell where a job is, not what it is


class Point(NamedTuple):
    """A place on a curve. tokens: consumed so far; seconds: of training steps so far; None and NaN: not known."""

    step: int
    loss: float  # may be NaN
    tokens: int | None = None
    seconds: float = math.nan


class SweptRun(NamedTuple):
    """A run with its curves and the overrides it was started with."""

    run: Run
    values: Mapping[str, str]  # key -> value
    train: list[Point]
    eval: list[Point]

    @property
    def eval_loss(self) -> float | None:
        """Of the last evaluation, nats per token."""
        return self.eval[-1].loss if self.eval else None

    @property
    def is_sound(self) -> bool:
        """Whether the losses it ended with are finite, or there are none yet."""
        return all(math.isfinite(curve[-1].loss) for curve in (self.train, self.eval) if curve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m bridge.sweep_report`; returns the exit code."""
    return guarded(lambda: _command(arguments), only_prints=True)


def _command(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    directory = Path(options.directory)
    target = Path(options.output) if options.output else directory / NAME
    _write(page(directory), target)
    print(f"written to {target}")
    return DONE


def page(directory: Path) -> str:
    """The HTML page on the runs at and below `directory`. ConfigError when there is none or it is not a directory."""
    found = read.find(directory)
    announced = {str(row.get("job")): _values(row.get("overrides")) for row in read.sweep_rows(directory)}
    if not found:
        raise ConfigError(f"{directory}: no run in it; give the directory of a sweep or of runs")
    given = {run.path: _values(read.overrides(run.path)) for run in found}
    keys = differing(list(given.values()), swept=[key for values in announced.values() for key in values])
    jobs = [_job(run, given[run.path] or announced.get(run.path.name, {})) for run in found]
    data = {
        "title": directory.resolve().name,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "keys": keys,
        "jobs": [_plain(job, keys) for job in sorted(jobs, key=_rank)],
    }
    return PAGE.read_text(encoding="utf-8").replace(PLACE, _embedded(data))


def differing(jobs: Sequence[Mapping[str, str]], *, swept: Sequence[str] = ()) -> list[str]:
    """The keys that a sweep varies, and those whose values differ between jobs; a job without any is not known."""
    keys = dict.fromkeys(swept) | dict.fromkeys(key for values in jobs for key in values)
    known = [values for values in jobs if values]
    return [
        key
        for key in keys
        if key not in UNIMPORTANT and (key in swept or len({values.get(key) for values in known}) > 1)
    ]


def thinned(points: Sequence[Point], *, limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: each the mean over equally many neighbours, at the last one's place. NaN stays NaN."""
    size = math.ceil(len(points) / limit) or 1
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [group[-1]._replace(loss=sum(point.loss for point in group) / len(group)) for group in groups]


def _job(run: Run, values: Mapping[str, str]) -> SweptRun:
    train: list[Point] = []
    evaluation: list[Point] = []
    reached: dict[int, tuple[int | None, float]] = {}  # step -> tokens and seconds when it was done
    seconds = 0.0
    for line in read.metrics(run.path):
        step, tokens = line["step"], line.get("consumed_tokens")
        if "eval_loss" not in line and "saved_step" not in line:
            seconds += read.number(line.get("step_seconds")) or math.nan
            reached[step] = tokens if isinstance(tokens, int) else None, seconds
        for name, curve in (("loss", train), ("eval_loss", evaluation)):
            value = read.number(line.get(name))
            if value is not None:
                curve.append(Point(step, value, *reached.get(step, (None, math.nan))))
    return SweptRun(run, values, train, evaluation)


def _values(overrides: object) -> dict[str, str]:
    """`["optimizer.lr=1e-3", "+data.x=2"]` -> {"optimizer.lr": "1e-3", "data.x": "2"}."""
    pairs = [str(item).lstrip("+").partition("=") for item in overrides] if isinstance(overrides, list) else []
    return {key: value for key, _, value in pairs if not key.startswith("hydra")}


def _rank(job: SweptRun) -> tuple[int, float, list[tuple[int, int | str]]]:
    """Best first: what is done, by its evaluation loss; then what may get there; then what went wrong."""
    loss = job.eval_loss
    if not job.is_sound or job.run.state in ("failed", "invalid", "died"):
        group = 2
    else:
        group = 0 if job.run.state == "done" else 1
    return group, math.inf if loss is None or math.isnan(loss) else loss, read.natural(job.run.name)


def _plain(job: SweptRun, keys: Sequence[str]) -> dict[str, Any]:
    """What the page's script reads."""
    run = job.run
    losses = [curve[-1].loss if curve else None for curve in (job.train, job.eval)]
    return {
        "name": run.name,
        "state": run.state,
        "trouble": not job.is_sound or run.state in ("failed", "invalid", "died"),
        "step": run.step,
        "steps": run.steps,
        "loss": _number(losses[0]),
        "eval_loss": _number(losses[1]),
        "tokens_per_second": _number(run.tokens_per_second),
        "values": [job.values.get(key) for key in keys],
        "error": run.error or _first_unsound(job),
        "where": run.where,
        "train": [_embeddable(point) for point in thinned(job.train)],
        "eval": [_embeddable(point) for point in thinned(job.eval)],
    }


def _embeddable(point: Point) -> list[Any]:
    seconds = None if math.isnan(point.seconds) else round(point.seconds, 3)
    return [point.step, _number(point.loss), point.tokens, seconds]


def _first_unsound(job: SweptRun) -> str | None:
    if job.is_sound:
        return None
    curves = (("loss", job.train), ("eval loss", job.eval))
    return next(
        f"step {point.step}: {name} is {point.loss}"
        for name, curve in curves
        for point in curve
        if not math.isfinite(point.loss)
    )


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN: it becomes the text `nan`."""
    return value if value is None or math.isfinite(value) else str(value)


def _embedded(data: object) -> str:
    """JSON that cannot end the <script> element it stands in, whatever texts it holds."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII only
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _write(text: str, target: Path) -> None:
    """Atomically: a page that is open in a browser and reloaded is never half a page."""
    try:
        write_text(text, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); set --output FILE") from error


def _parser() -> Parser:
    parser = Parser(
        prog="python -m bridge.sweep_report",
        description="One HTML page: loss curves of all jobs, what differed between them, best first.",
    )
    parser.add_argument("directory", help="of a sweep (runs/sweeps/NAME), or any directory of runs")
    parser.add_argument("--output", metavar="FILE", help=f"where to write the page (DIRECTORY/{NAME})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
