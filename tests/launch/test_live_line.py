"""The line at the bottom of a terminal: what it tells, and that it makes room for what is printed."""

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest

from bridge.launch import live_line
from bridge.launch.live_line import ERASE
from bridge.training import console, pulse
from bridge.training.console import TimeLeft
from bridge.training.pulse import Pulse
from tests.training.runs import config


def test_the_line_follows_the_run_and_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live_line, "INTERVAL", 0.02)
    monkeypatch.setattr(live_line, "QUIET", 0.05)
    monkeypatch.setattr(live_line, "unread", lambda pipe: 0)  # stdout is no pipe here
    ours, theirs = pty.openpty()
    seen = ""

    def read_until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 20
        while text not in seen:
            assert select.select([ours], [], [], 20)[0] and time.monotonic() < deadline, f"no {text!r} in {seen!r}"
            seen = (seen + os.read(ours, 1000).decode())[-5000:]
        seen = seen[seen.index(text) + len(text) :]

    before = sys.stdout
    place = Pulse()
    with live_line.following(place, config(tmp_path), terminal=theirs):
        read_until(f"\r{ERASE}run: importing torch and megatron-core, 0s\r")
        place.enter(pulse.PREPARING)
        read_until("run: preparing data, 0s\r")
        place.steps = 20
        place.enter(pulse.COMPUTING, step=3)
        read_until("run: step 3/20")
        print("a line of the run's own")
        read_until(f"\r{ERASE}\r{ERASE}run: step 3/20")  # erased for the print, and there again
    read_until(f"\r{ERASE}")
    assert sys.stdout is before


def test_elsewhere_there_is_no_line(tmp_path: Path):
    with (tmp_path / "file").open("w") as file:
        for terminal in (None, file.fileno()):
            with live_line.following(Pulse(), config(tmp_path), terminal=terminal):
                assert not isinstance(sys.stdout, live_line._Yielding)


def test_time_left(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    left = TimeLeft(20)
    assert left.after(10) is None
    assert TimeLeft(20).after(10, step_seconds=3.0) == 30.0
    now += 50  # five steps of 10 s, an evaluation among them
    assert left.after(15, step_seconds=1.0) == 50.0
    assert left.after(20) == 0.0
    place = Pulse()
    place.enter(pulse.SAVING, step=16)
    place.finished_steps = 5
    assert live_line.described(place, left) == "step 16/20, 33s left"
    now += 70
    assert live_line.described(place, left) == "step 16/20, saving, 1m10s, 1m20s left"
