"""A warm process is, to whoever looks, the process that was asked for."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

pytestmark = pytest.mark.usefixtures("warm_processes")
TELL = """
import json, os, signal, subprocess, sys
child = subprocess.run([sys.executable, "-c", "import os; print(os.getppid())"], capture_output=True, text=True)
print(json.dumps({
    "loaded": "torch" in sys.modules and "pytest" in sys.modules,
    "argv": sys.argv,
    "shown": [word for word in open("/proc/self/cmdline").read().split("\\0") if word],
    "ids": [os.getpid(), os.getppid(), os.getsid(0)],
    "child": int(child.stdout),
    "directory": os.getcwd(),
    "told": os.environ.get("TOLD"),
    "descriptors": [int(name) for name in os.listdir("/proc/self/fd")],
    "input": sys.stdin.read(),
    "module": __name__,
}))
raise SystemExit(7)
"""


def told(arguments: list[str], folder: Path) -> tuple[dict[str, object], int]:
    """What TELL said, started with `arguments` of Python, and the process id that subprocess gave."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "TOLD": "so"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, _ = process.communicate("given")
    assert process.returncode == 7
    return json.loads(out), process.pid


@pytest.mark.parametrize("start", [["-c", TELL], ["tell.py"], ["-u", "-m", "tell"]])
def test_it_is_the_process_that_was_asked_for(start: list[str], tmp_path: Path):
    (tmp_path / "tell.py").write_text(TELL)
    found, pid = told([*start, "a", "b c"], tmp_path)
    with warm.real():
        real, _ = told([*start, "a", "b c"], tmp_path)
    assert (found.pop("loaded"), real.pop("loaded")) == (True, False)
    assert (found.pop("ids"), found.pop("child")) == ([pid, os.getpid(), pid], pid)
    extra = set(found.pop("descriptors")) - set(real.pop("descriptors"))
    assert len(extra) <= 1  # the socket to its twin
    for name in ("ids", "child"):
        real.pop(name)
    assert found == real


def test_it_ends_as_the_process_would():
    def ended(code: str) -> int:
        return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode

    assert ended("raise ValueError") == 1
    assert ended("import sys; sys.exit('told')") == 1
    assert ended("import os; os._exit(3)") == 3
    assert ended("import os; os.kill(os.getpid(), 9)") == -signal.SIGKILL
    assert ended("raise KeyboardInterrupt") == -signal.SIGINT


def test_a_fork_of_a_warm_process_starts_real_ones():
    code = (
        "import os, subprocess, sys\n"
        "if os.fork() == 0:\n"
        "    loaded = \"import sys; raise SystemExit(3 + ('torch' in sys.modules))\"\n"
        "    os._exit(subprocess.run([sys.executable, '-c', loaded]).returncode)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3
