"""What tests/forks/sitecustomize.py notes, and so fails the test that it happens in."""

import os
import subprocess
import sys

import pytest

from tests.forks.sitecustomize import NOTES

WAIT = "import os, subprocess, sys, threading; done = threading.Event()\n"
THREAD = "threading.Thread(target=done.wait).start()\n"
FORK = "pid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)\n"
PREEXEC = "subprocess.run(['true'], preexec_fn=int)\n"
POPEN = "subprocess.run(['true'])\n"


@pytest.mark.parametrize(
    ("code", "noted"),
    [
        (THREAD + FORK, ["os.fork"]),
        (THREAD + PREEXEC, ["subprocess.Popen"]),
        (THREAD + POPEN, []),
        (FORK + PREEXEC, []),
    ],
)
def test_a_fork_of_a_process_with_threads_is_noted(tmp_path, code: str, noted: list[str]) -> None:
    command = [sys.executable, "-c", f"{WAIT}{code}done.set()"]
    subprocess.run(command, env={**os.environ, NOTES: str(tmp_path)}, check=True)
    lines = [line for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert [line.split()[0] for line in lines if " threads, " in line] == noted
