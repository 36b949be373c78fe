"""How long each test takes: with -n the longest start first, and those that take no time are marked `fast`.

`pytest --write-durations` notes in durations.json what it measures. A file that is not there is taken to need 10 s, and
none of its tests to be fast; in one that is there, the tests that are not listed are.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from xdist.scheduler import LoadScopeScheduling

FILE = Path(__file__).with_suffix(".json")
FAST = 0.3  # seconds, the fixtures that a test shares with others included
UNKNOWN = 10.0  # seconds of a file that is not in durations.json
SPLIT = ("tests/test_docs.py",)  # files of which the tests share no fixture: they need not stay in one process


class Known(NamedTuple):
    """Of one file: the seconds of all its tests, and those of each slow one's slowest case."""

    seconds: float
    slow: dict[str, float]


def read() -> dict[str, Known]:
    """What is known, by file."""
    return {file: Known(**known) for file, known in json.loads(FILE.read_text()).items()} if FILE.exists() else {}


def unit_of(nodeid: str) -> str:
    """What stays in one process with the test `nodeid`: its file, or only itself."""
    file = nodeid.partition("::")[0]
    return nodeid if file in SPLIT else file


def name_of(nodeid: str) -> str:
    """The name in durations.json of a test: without its parameters, where its file stays in one process."""
    file, _, name = nodeid.partition("::")
    return name if file in SPLIT else name.partition("[")[0]


class Scheduling(LoadScopeScheduling):
    """With -n: what `unit_of` says stays in one process, which makes its fixtures (a Slurm, a checkpoint) once."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


class Plugin:
    """Sorts and marks the tests; measures them where `--write-durations` asks for it."""

    def __init__(self, config: pytest.Config) -> None:
        if config.option.write_durations and (config.option.keyword or config.option.markexpr):
            raise pytest.UsageError("--write-durations: measures whole files; leave out -k and -m")
        self._config = config
        self._fixtures: dict[str, float] = {}  # those that several tests share, once they are set up
        self._took: defaultdict[str, float] = defaultdict(float)  # by test
        self._alone: dict[str, float] = {}  # by test, with the fixtures that it shares

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Scheduling:
        config.option.loadscopereorder = False  # by number of tests: those that take minutes would come last
        return Scheduling(config, log)

    @pytest.hookimpl(tryfirst=True)  # before those that are not fast are left out by -m
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = read()
        order: dict[str, float] = {}
        for item in items:
            file, unit = item.nodeid.partition("::")[0], unit_of(item.nodeid)
            there = known.get(file, Known(UNKNOWN, {}))
            seconds = there.slow.get(name_of(item.nodeid))
            order[unit] = there.seconds if unit == file else seconds or 0.0
            if seconds is None and file in known:
                item.add_marker("fast")
        items.sort(key=lambda item: -order[unit_of(item.nodeid)])

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        since = time.perf_counter()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self._fixtures[f"{fixturedef.baseid}::{fixturedef.argname}"] = time.perf_counter() - since

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if call.when == "setup":
            shared = [key for key in self._fixtures if key.rpartition("::")[2] in getattr(item, "fixturenames", ())]
            item.user_properties.append(("shared", sum(self._fixtures[key] for key in shared)))
        report.user_properties = list(item.user_properties)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._took[report.nodeid] += report.duration
        shared = dict(report.user_properties).get("shared", 0.0)
        self._alone[report.nodeid] = self._took[report.nodeid] + float(str(shared))

    def pytest_sessionfinish(self) -> None:
        if self._config.option.write_durations and not hasattr(self._config, "workerinput"):
            write(self._took, self._alone)


def write(took: dict[str, float], alone: dict[str, float]) -> None:
    """Put the files of these tests into durations.json, which keeps the others."""
    known = read()
    for file in {nodeid.partition("::")[0] for nodeid in took}:
        slow: dict[str, float] = {}
        for nodeid, seconds in alone.items():
            if nodeid.startswith(f"{file}::") and seconds > FAST:
                slow[name_of(nodeid)] = round(max(seconds, slow.get(name_of(nodeid), 0.0)), 1)
        total = sum(seconds for nodeid, seconds in took.items() if nodeid.startswith(f"{file}::"))
        known[file] = Known(round(total, 1), dict(sorted(slow.items())))
    there = {file: known[file]._asdict() for file in sorted(known) if (FILE.parent.parent / file).exists()}
    FILE.write_text(json.dumps(there, indent=1) + "\n")
