"""bridge.sweep_report: the page in a real browser, and what goes into it."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bridge import sweep_report
from bridge.runs.result import Result
from bridge.sweep_report import Point
from tests.test_status import evaluation, run_dir, training

BROWSER = shutil.which("chromium")
SCRIPT = "</script><script>document.title='owned'</script><!-- <script>"

needs_browser = pytest.mark.skipif(
    BROWSER is None and os.environ.get("CI") != "true", reason="needs a browser: apt-get install chromium"
)


def make_sweep(root: Path) -> Path:
    """Five jobs: two that are done, one whose loss became NaN, one that failed, one that has not begun."""
    jobs = [
        ("1e-3", Result("done", 40, 2.5), [4.0 - 0.035 * step for step in range(40)]),
        ("3e-3", Result("done", 40, 1.25), [4.0 - 0.07 * step for step in range(40)]),
        ("1e-2", Result("done", 40, None), [4.0] * 20 + [math.nan] * 20),
        ("<b>1</b>", Result("failed", 3, error=f"RuntimeError: {SCRIPT}"), [5.0] * 3),
    ]
    rows = []
    for number, (lr, result, losses) in enumerate(jobs):
        counted = {"step_seconds": 30.0}
        lines = "".join(
            training(step, loss, consumed_tokens=step * 100_000, **counted) for step, loss in enumerate(losses, 1)
        )
        if len(losses) == 40:
            last = math.nan if result.eval_loss is None else result.eval_loss
            lines += evaluation(20, 3.0) + evaluation(40, last)
        path = run_dir(root / "sweeps", f"s/{number}", result=result, lines=lines, steps=40)
        overrides = [f"+optimizer.lr={lr}", "train.steps=40", f"name=s/{number}"]
        (path / "overrides.yaml").write_text(json.dumps(overrides))
        rows.append({"job": number, "overrides": overrides[:1], "run_dir": str(path), "status": result.status})
    rows.append({"job": 4, "overrides": ["optimizer.lr=9"], "run_dir": str(root / "sweeps/s/4"), "status": "pending"})
    (root / "sweeps" / "s" / "sweep.json").write_text(json.dumps(rows))
    return root / "sweeps" / "s"


class Page(HTMLParser):
    """The rendered page: its title, table cells, and what is drawn for each job in each chart."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.title, self.head, self.rows = "", [], []
        self.drawn: dict[str, dict[str, list[str]]] = {"train": {}, "eval": {}}  # chart -> job -> classes of its parts
        self.focused: list[str] = []  # rows that stand out
        self.texts: dict[str, list[str]] = {"train": [], "eval": []}
        self.shapes: list[str] = []  # of the curves
        self.raw: list[str] = []  # of the losses behind smoothed curves
        self.into: list[str] | None = None
        self.chart: str | None = None
        self.job: str | None = None
        self.in_title = False
        self.feed(dom)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        if given.get("class") == "raw":
            self.raw.append(given["d"])
        elif tag == "title":
            self.in_title = True
        elif tag == "svg":
            self.chart = given["id"]
        elif tag == "g" and self.chart:
            self.job = given["data-job"]
            self.drawn[self.chart][self.job] = []
        elif tag in ("path", "circle") and self.chart and self.job:
            self.drawn[self.chart][self.job].append(given.get("class", tag))
            self.shapes.append(given.get("d", ""))
        elif tag == "tr" and "data-job" in given:
            self.rows.append([])
            if "on" in given["class"].split():
                self.focused.append(given["data-job"])
        elif tag in ("th", "td"):
            self.into = self.head if tag == "th" else self.rows[-1]
            self.into.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self.in_title = False
        elif tag == "svg":
            self.chart = self.job = None
        elif tag in ("th", "td"):
            self.into = None

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title += data
        elif self.into is not None:
            self.into[-1] += data
        elif self.chart and data.strip():
            self.texts[self.chart].append(data)

    def column(self, title: str) -> list[str]:
        return [row[self.head.index(title)] for row in self.rows]


def rendered(path: Path, *, action: str = "") -> Page:
    """`path` as the browser shows it, after running `action`."""
    return Page(dom(path, action=action))


def dom(path: Path, *, action: str = "") -> str:
    """What the browser makes of `path`, after running `action`, JavaScript, as a visitor would click."""
    assert BROWSER, "CI=true and no chromium"
    shown = path.with_name("shown.html")
    shown.write_text(path.read_text().replace("</body>", f"<script>{action}</script></body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--dump-dom"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    done = subprocess.run([*command, profile, shown.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_browser
def test_the_page_in_a_browser(tmp_path):
    directory = make_sweep(tmp_path)
    assert sweep_report.main([str(directory)]) == 0
    page = rendered(directory / "report.html")

    assert page.title == "s: sweep report"  # no text of a file ran as a script
    assert page.column("job") == ["1", "0", "4", "2", "3"]  # best first, then what may yet be, then what went wrong
    assert page.column("optimizer.lr") == ["3e-3", "1e-3", "9", "1e-2", "<b>1</b>"]
    assert page.column("state") == ["done", "done", "pending", "done, loss not finite", "failed"]
    assert page.column("eval loss") == ["1.2500", "2.5000", "\N{EN DASH}", "NaN", "\N{EN DASH}"]
    assert page.column("training loss") == ["1.2700", "2.6350", "\N{EN DASH}", "NaN", "5.0000"]
    assert page.column("error")[3:] == ["step 21: loss is nan", f"RuntimeError: {SCRIPT}"]
    assert not {"train.steps", "name"} & set(page.head)

    assert {job: parts[0] for job, parts in page.drawn["train"].items()} == dict.fromkeys("0123", "curve")
    circles = {chart: {job: parts.count("circle") for job, parts in page.drawn[chart].items()} for chart in page.drawn}
    assert circles == {"train": {"0": 40, "1": 40, "2": 20, "3": 3}, "eval": {"0": 2, "1": 2, "2": 1}}
    assert [job for job, parts in page.drawn["train"].items() if "broken" in parts] == ["2"]
    assert page.texts["eval"] and "no finite loss yet" not in page.texts["eval"]
    assert page.focused == []


@needs_browser
def test_clicks(tmp_path):
    directory = make_sweep(tmp_path)
    assert sweep_report.main([str(directory), "--output", str(tmp_path / "mine.html")]) == 0
    before = rendered(tmp_path / "mine.html", action='document.querySelector("tr[data-job]").click()')
    assert before.focused == ["1"]
    page = rendered(
        tmp_path / "mine.html",
        action="""
        const heading = title => [...document.querySelectorAll("th button")].find(b => b.textContent === title);
        heading("training loss").click();
        heading("training loss").click();
        document.querySelector('tr[data-job="0"]').click();
        document.getElementById("log-loss").click();
        """,
    )
    assert page.column("job") == ["3", "0", "1", "4", "2"]  # highest first; nothing and NaN last all the same
    assert page.focused == ["0"]
    assert len(page.shapes) == len(before.shapes) and page.shapes != before.shapes  # on another axis


@needs_browser
def test_axes_and_smoothing(tmp_path):
    directory = make_sweep(tmp_path)
    assert sweep_report.main([str(directory)]) == 0
    choose = """
    const choose = (id, value, type) => {
      document.getElementById(id).value = value;
      document.getElementById(id).dispatchEvent(new Event(type));
    };
    """
    by_step = rendered(directory / "report.html")
    by_tokens = rendered(directory / "report.html", action=f'{choose} choose("axis", 2, "change")')
    by_time = rendered(
        directory / "report.html", action=f'{choose} choose("axis", 3, "change"); choose("smoothing", 0.5, "input")'
    )
    assert by_step.texts["train"][-1] == by_step.texts["eval"][-1] == "step" and "40" in by_step.texts["train"]
    assert by_tokens.texts["eval"][-1] == "tokens" and "4M" in by_tokens.texts["train"]  # 40 steps of 100,000
    assert by_time.texts["eval"][-1] == "minutes of training" and "20" in by_time.texts["train"]  # 40 steps of 30 s
    assert (by_tokens.raw, len(by_time.raw)) == ([], 4)

    # Steps are of equal size, so curves by tokens are those by steps. By time and smoothed, the losses stay there, four
    # of them in this chart, and a curve is their moving average.
    assert curves(by_tokens) == curves(by_step)
    assert by_time.raw == curves(by_step)[:4]
    heights = [y for _, y in points(next(raw for raw in by_time.raw if len(points(raw)) == 40))]
    smooth = next(curve for curve in curves(by_time) if len(points(curve)) == 40 and curve not in by_time.raw)
    mean = weight = 0.0
    for height, (_, found) in zip(heights, points(smooth), strict=True):
        mean, weight = 0.5 * mean + 0.5 * height, 0.5 * weight + 0.5
        assert found == pytest.approx(mean / weight, abs=0.11)


def curves(page: Page) -> list[str]:
    return [shape for shape in page.shapes if shape and "l10" not in shape]  # neither circles nor crosses


def points(shape: str) -> list[tuple[float, float]]:
    """`M1 2L3 4` -> [(1, 2), (3, 4)]."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+) ([^LM]+)", shape)]


@needs_browser
def test_a_page_on_runs_without_a_loss(tmp_path):
    run_dir(tmp_path, "alone", result=Result("invalid", error="init.path: missing"))
    assert sweep_report.main([str(tmp_path)]) == 0
    page = rendered(tmp_path / "report.html")
    assert (page.column("job"), page.column("error")) == (["alone"], ["init.path: missing"])
    assert page.texts["train"] == ["no finite loss yet"]


def test_the_page_asks_nobody_for_anything(tmp_path):
    page = sweep_report.page(make_sweep(tmp_path))
    assert "default-src 'none'" in page
    assert not any(
        word in page.replace("http://www.w3.org/2000/svg", "") for word in ("http:", "https:", "src=", "@import")
    )
    assert SCRIPT not in page
    assert str(tmp_path) not in page  # it can be mailed


def test_what_differs():
    jobs = [{"lr": "1", "name": "a", "steps": "5"}, {"lr": "2", "name": "b", "steps": "5"}, {}]
    assert sweep_report.differing(jobs) == ["lr"]
    assert sweep_report.differing([*jobs, {"lr": "1", "steps": "5", "new": "x"}]) == ["lr", "new"]
    assert sweep_report.differing([{"lr": "1", "steps": "5"}], swept=["lr"]) == ["lr"]


def test_long_curves_are_means():
    points = [Point(step, float(step), step * 7, step * 0.5) for step in range(1, 1000)]
    thinned = sweep_report.thinned(points, limit=100)
    assert len(thinned) == 100
    assert thinned[0] == (10, 5.5, 70, 5.0) and thinned[-1] == (999, 995.0, 6993, 499.5)
    assert sweep_report.thinned(points[:100], limit=100) == points[:100]
    assert math.isnan(sweep_report.thinned([*points, Point(1000, math.nan)], limit=100)[-1].loss)


def test_nothing_to_report_and_nowhere_to_write(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    directory = make_sweep(tmp_path)
    missing = tmp_path / "no" / "page.html"
    for arguments, message in [
        ([str(tmp_path / "empty")], f"{tmp_path}/empty: no run in it; give the directory of a sweep or of runs\n"),
        (
            [str(tmp_path / "none")],
            f"{tmp_path}/none: no such directory; give a directory of runs, such as runs/ or runs/sweeps/NAME\n",
        ),
        (
            [str(directory), "--output", str(missing)],
            f"{missing}: cannot be written (No such file or directory); set --output FILE\n",
        ),
    ]:
        assert sweep_report.main(arguments) == 2
        assert capsys.readouterr() == ("", message)
