"""Every `python -m bridge.NAME`: its --help, its mistakes in one line, and a reader that leaves."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from bridge.runs.result import Result
from tests.test_status import run_dir

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {
    "bridge.generate": "bridge.generate.__main__",
    "bridge.inspect": "bridge.inspect",
    "bridge.prepare": "bridge.prepare",
    "bridge.checkpoint": "bridge.checkpoint.__main__",
    "bridge.status": "bridge.status",
    "bridge.sweep_report": "bridge.sweep_report",
}
# Started by the product itself, with arguments that nobody types.
INTERNAL = {
    "bridge.data.encode.engine",
    "bridge.data.encode.process",
    "bridge.launch.worker",
    "bridge.launch.elastic",
    "bridge.launch.notebook",
    "bridge.training.hf_exports",
}


def main_of(tool: str) -> Callable[[list[str]], int]:
    return import_module(TOOLS[tool]).main


def test_these_are_all_tools():
    entries = [path for path in (ROOT / "bridge").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in entries}
    assert names == TOOLS.keys() | INTERNAL


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("tool", TOOLS)
def test_help(tool: str, flag: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = main_of(tool)([flag])
    except SystemExit as leaving:  # argparse's way
        code = leaving.code
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert f"usage: python -m {tool}" in out and len(out.splitlines()) > 4
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("bridge.status", ["--wach"], "unrecognized arguments: --wach; did you mean '--watch'?"),
        (
            "bridge.status",
            ["--interval", "0"],
            "argument --interval: 0 is not between 0.1 and 86400 seconds",
        ),
        ("bridge.status", ["--interval", "x"], "argument --interval: 'x' is not a number of seconds; see --help"),
        ("bridge.status", ["--state=faild"], "argument --state: no state 'faild'; did you mean 'failed'?"),
        (
            "bridge.status",
            ["--state=x"],
            "argument --state: no state 'x'; the states are running, pending, died, ",
        ),
        ("bridge.status", ["--sort", "lr"], "argument --sort: invalid choice: 'lr' (choose from 'name', 'state', "),
        ("bridge.status", ["--json", "--watch"], "argument --watch: not allowed with argument --json; see --help"),
        ("bridge.sweep_report", [], "the following arguments are required: directory; see --help"),
        ("bridge.sweep_report", ["x", "--outptu=y"], "unrecognized arguments: --outptu=y; did you mean '--output'?"),
        ("bridge.checkpoint", ["verify"], "the following arguments are required: PATH; see --help"),
        ("bridge.checkpoint", ["vrify", "x"], "argument command: invalid choice: 'vrify' (choose from 'verify'); see"),
    ],
)
def test_mistakes_are_one_line(tool: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main_of(tool)(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"python -m {tool}: ") and message in err


def test_verify_refuses_a_path_before_torch(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bridge.checkpoint.intact", None)  # its import, with torch's, then raises
    assert main_of("bridge.checkpoint")(["verify", str(tmp_path / "none")]) == 2
    assert re.fullmatch(r"path: .*/none is not a directory; give a run .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["bridge.status", "."], ["bridge.generate", "--help"]])
def test_a_reader_that_has_gone_is_no_trouble(arguments: list[str], tmp_path: Path):
    """As with `| head -1`."""
    run_dir(tmp_path, "a", result=Result("done", 20))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", *arguments]
    buffering = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=tmp_path, env=buffering, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
