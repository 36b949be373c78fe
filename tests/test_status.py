"""bridge.status: every state from real files, damaged ones, Slurm's word, and the table in a pipe and on a terminal."""

import fcntl
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bridge import status
from bridge.runs import read
from bridge.runs.claim import claimed
from bridge.runs.result import Result, write_rank_error, write_result
from tests.training.runs import config

GARBAGE = (b"", b"\x00\xff\xfe\x80", b"[", b"{}", b"null", b'{"status": 3, "step": "x"}', b"[" * 100_000, b"- : [\n\t!")


def run_dir(root: Path, name: str, *, result: Result | None = None, lines: str = "", steps: int = 20) -> Path:
    """A run directory as the driver and its workers leave it."""
    with claimed(config(root, name=name, train={"steps": steps}), overrides=[f"name={name}"]) as claim:
        if lines:
            (claim.path / "metrics.jsonl").write_text(lines)
        if result:
            write_result(result, claim.path)
    return claim.path


def training(step: int, loss: float, **more: float) -> str:
    return json.dumps({"step": step, "loss": loss, "tokens_per_second": 1234.5, **more}) + "\n"


def evaluation(step: int, loss: float) -> str:
    return json.dumps({"step": step, "eval_loss": loss}) + "\n"


def found(root: Path) -> dict[str, read.Run]:
    return {run.name: run for run in read.find(root)}


def test_every_state(tmp_path, capsys):
    lines = training(9, 3.5) + evaluation(10, 3.25) + training(10, 3.0)
    run_dir(tmp_path, "a/done", result=Result("done", 20, 2.5), lines=lines)
    run_dir(tmp_path, "a/stopped", result=Result("stopped", 10), lines=lines)
    run_dir(tmp_path, "failed", result=Result("failed", error="RuntimeError: the \x1b[31mdisk\nis full"))
    run_dir(tmp_path, "invalid", result=Result("invalid", error="init.path: no such directory"))
    died = run_dir(tmp_path, "died", lines=lines)
    (died / "logs" / "rank_0.log").write_text("step 10/20\nKilled\n\n")
    run_dir(tmp_path, "prepared")
    raised = run_dir(tmp_path, "raised")
    write_rank_error(Result("failed", error="OSError: first"), raised, rank=1)
    write_rank_error(Result("failed", error="peer lost"), raised, rank=0)
    with claimed(config(tmp_path, name="busy"), overrides=[]) as claim:
        (claim.path / "metrics.jsonl").write_text(lines)
        states = found(tmp_path)
        assert status.main([str(tmp_path)]) == 0
    table = capsys.readouterr().out

    assert {name: run.state for name, run in states.items()} == {
        "a/done": "done",
        "a/stopped": "stopped",
        "busy": "running",
        "died": "died",
        "failed": "failed",
        "invalid": "invalid",
        "prepared": "pending",
        "raised": "died",
    }
    assert states["busy"].where == f"process {os.getpid()} on {os.uname().nodename}"
    assert (states["busy"].step, states["busy"].steps, states["busy"].loss, states["busy"].eval_loss) == (
        10,
        20,
        3.0,
        3.25,
    )
    assert states["died"].error == "ended without a result; last line of its log: Killed"
    assert states["raised"].error == "OSError: first"
    assert re.search(r"^a/done +done +20/20 +3\.0000 +3\.2500 +1,234 +\d s +-$", table, flags=re.MULTILINE)
    assert re.search(r"^failed +failed .* RuntimeError: the  ?\[31mdisk is full$", table, flags=re.MULTILINE)
    assert "\x1b" not in table
    assert table.splitlines()[-1] == "2 died, 1 done, 1 failed, 1 invalid, 1 pending, 1 running, 1 stopped"
    assert found(tmp_path)["busy"].state == "died"


def five_runs(root: Path) -> None:
    """Five runs that ended, of which one has lost its loss."""
    for name, status_, loss in [
        ("a2", "done", 2.0),
        ("a10", "done", 1.0),
        ("b", "failed", 3.0),
        ("c", "stopped", math.nan),
        ("d", "invalid", None),
    ]:
        lines = "" if loss is None else training(5, loss)
        run_dir(root, name, result=Result(status_, 5), lines=lines)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["a2", "a10", "b", "c", "d"]),
        (["--reverse"], ["d", "c", "b", "a10", "a2"]),
        (["--state", "failed"], ["b"]),
        (["--state", "failed,stopped"], ["b", "c"]),
        (["--state", "running"], []),
        (["--sort", "loss"], ["a10", "a2", "b", "c", "d"]),  # NaN and nothing last
        (["--sort", "loss", "--reverse"], ["b", "a2", "a10", "c", "d"]),
        (["--sort", "state", "--state", "done,invalid"], ["a2", "a10", "d"]),
        (["--sort", "age", "--state", "invalid,done", "--reverse"], ["a2", "a10", "d"]),
    ],
)
def test_which_runs_and_in_which_order(arguments, expected, tmp_path, capsys):
    five_runs(tmp_path)
    os.utime(tmp_path / "a2" / "metrics.jsonl", (1, 1))
    assert status.main([str(tmp_path), *arguments]) == 0
    _, *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == expected
    assert expected or last == "no run is in that state"
    assert status.main([str(tmp_path), *arguments, "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == expected


def test_for_programs_and_when_it_will_be_done(tmp_path, capsys):
    five_runs(tmp_path)
    with claimed(config(tmp_path, name="busy"), overrides=[]) as claim:
        (claim.path / "metrics.jsonl").write_text(training(5, 1.5, step_seconds=100.0) + evaluation(5, 2.5))
        assert status.main([str(tmp_path), "--json"]) == 0
        listed = {run.pop("name"): run for run in json.loads(capsys.readouterr().out)}
        assert status.main([str(tmp_path), "--state=running"]) == 0
        assert re.search(r"^busy .* (24m\d+s|25m) +process \d+ on ", capsys.readouterr().out, flags=re.MULTILINE)
    busy = listed["busy"]
    assert 1400 < busy.pop("eta_seconds") <= 1500  # fifteen steps
    assert 0 <= busy.pop("age_seconds") < 100
    assert busy == {
        "path": str(tmp_path / "busy"),
        "state": "running",
        "where": f"process {os.getpid()} on {os.uname().nodename}",
        "step": 5,
        "steps": 20,
        "loss": 1.5,
        "eval_loss": 2.5,
        "tokens_per_second": 1234.5,
        "error": None,
        "slurm_job": None,
    }
    assert (listed["c"]["loss"], listed["a2"]["eta_seconds"]) == (None, None)


def test_the_steps_of_epochs(tmp_path):
    """3 epochs of 7 samples in batches of 4, as the last reported step tells; unknown before."""
    length = {"steps": None, "epochs": 3}
    for name, lines in {"new": "", "begun": training(2, 3.0, epoch=8 / 7), "done": training(6, 3.0, epoch=3.0)}.items():
        with claimed(config(tmp_path, name=name, train=length), overrides=[]) as claim:
            (claim.path / "metrics.jsonl").write_text(lines)
    assert {name: run.steps for name, run in found(tmp_path).items()} == {"new": None, "begun": 6, "done": 6}


def test_losses_that_are_not_numbers_and_lines_cut_short(tmp_path, capsys):
    run_dir(tmp_path, "nan", lines=training(4, math.nan) + evaluation(4, math.inf) + '{"step": 5, "lo')
    run_dir(
        tmp_path, "odd", lines='{"step": "x", "loss": 1}\n{"step": 3, "loss": "high", "tokens_per_second": null}\n7\n'
    )
    assert status.main([str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^nan +died +4/20 +nan +inf ", table, flags=re.MULTILINE)
    assert re.search(r"^odd +died +3/20 +- +- +- ", table, flags=re.MULTILINE)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_damaged_files_crash_nothing(garbage, tmp_path, capsys):
    path = run_dir(tmp_path, "sweeps/s/0", lines=training(4, 1.5))
    names = ("config.yaml", "overrides.yaml", "metrics.jsonl", "result.json", "job.json", "lock", "logs/rank_0.error")
    for name in names:
        (path / name).write_bytes(garbage)
    (path.parent / "sweep.json").write_bytes(garbage)
    assert status.main([str(tmp_path)]) == 0
    assert re.search(r"^sweeps/s/0 +died +- ", capsys.readouterr().out, flags=re.MULTILINE)


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    path = run_dir(tmp_path, "long") / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
        file.seek(0, os.SEEK_END)
        file.write(("\n" + evaluation(1000, 2.5) + training(1001, 2.25)).encode())
    (run,) = read.find(tmp_path)
    assert (run.step, run.loss, run.eval_loss) == (1001, 2.25, 2.5)


def test_jobs_without_files_of_their_own(tmp_path):
    """A sweep.json knows jobs that were refused before they began."""
    run_dir(tmp_path, "sweeps/s/2", result=Result("done", 20, 1.5))
    row = {"run_dir": "/moved/since/sweeps/s/", "overrides": ["a=1"]}
    rows = [{**row, "job": 2, "status": "done"}, {**row, "job": 10, "status": "invalid", "error": "a: is wrong"}]
    rows = [{**each, "run_dir": f"{each['run_dir']}{each['job']}"} for each in rows]
    (tmp_path / "sweeps" / "s" / "sweep.json").write_text(json.dumps(rows))
    listed = read.find(tmp_path)
    assert [(run.name, run.state, run.error) for run in listed] == [
        ("sweeps/s/2", "done", None),
        ("sweeps/s/10", "invalid", "a: is wrong"),
    ]
    assert listed[0].eval_loss == 1.5  # from its result: a job of eval_only=true writes no metrics


def test_slurm_is_asked_about_jobs_that_nobody_holds(tmp_path, monkeypatch):
    """Programs that answer as Slurm's do: five jobs, of which squeue no longer knows the one that sacct does."""
    answers = {
        "squeue": "1|PENDING\n2|RUNNING\n5|PENDING\n",
        "sacct": "1|COMPLETED\n3|OUT_OF_MEMORY\n4|CANCELLED by 0\n",
    }
    for program, answer in answers.items():
        file = tmp_path / "bin" / program
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\ncat <<EOF\n{answer}EOF\n")
        file.chmod(0o755)
    for job, result in [(1, Result("stopped", 5)), (2, None), (3, None), (4, Result("done", 20)), (5, None)]:
        path = run_dir(tmp_path / "runs", f"r{job}", result=result)
        (path / "job.json").write_text(json.dumps({"slurm_job_id": str(job)}))
    assert {run.state for run in read.find(tmp_path / "runs")} == {"stopped", "pending", "done"}  # no Slurm here

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with claimed(config(tmp_path / "runs", name="r5"), overrides=[]):
        listed = {run.name: (run.state, run.where or run.error) for run in read.find(tmp_path / "runs")}
    assert listed == {
        "r1": ("pending", "Slurm job 1"),
        "r2": ("running", "Slurm job 2"),
        "r3": ("died", "Slurm ended job 3: OUT_OF_MEMORY"),
        "r4": ("done", None),
        "r5": ("running", f"Slurm job 5, process {os.getpid()} on {os.uname().nodename}"),
    }
    assert all("-j 1,2,3" in line for line in (tmp_path / "asked").read_text().splitlines())


def test_looking_does_not_keep_a_run_from_starting(tmp_path):
    path = run_dir(tmp_path, "a")
    with (path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # what a look holds for an instant
        threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with claimed(config(tmp_path, name="a"), overrides=[]) as claim:
            assert claim.path == path


def test_nothing_to_show(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, message in [
        (["empty"], "empty: no run in it; give the directory that holds the runs\n"),
        (["missing"], "missing: no such directory; give a directory of runs, such as runs/ or runs/sweeps/NAME\n"),
        (["file"], "file: is a file; give a directory of runs, such as runs/ or runs/sweeps/NAME\n"),
    ]:
        assert status.main([str(tmp_path / name) for name in arguments]) == 2
        assert capsys.readouterr() == ("", f"{tmp_path}/{message}")


def test_several_directories(tmp_path, capsys):
    run_dir(tmp_path / "x", "a", result=Result("done", 20))
    run_dir(tmp_path / "y", "a", result=Result("done", 20))
    assert status.main([str(tmp_path / "x"), str(tmp_path / "y" / "a"), str(tmp_path / "y")]) == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert first == ["run", f"{tmp_path}/x/a", f"{tmp_path}/y/a", "2"]


def test_watching(tmp_path):
    """In a pipe one table after another, uncut; on a terminal in place, in colour, cut to its width. Ctrl-C ends it."""
    run_dir(tmp_path, "a", result=Result("failed", error="E" * 300))
    command = [sys.executable, "-m", "bridge.status", str(tmp_path), "--watch", "--interval", "0.1"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background jobs ignore it
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    seen = [piped.stdout.readline() for _ in range(10)]
    piped.send_signal(signal.SIGINT)
    _, err = piped.communicate(timeout=60)
    assert (piped.returncode, err) == (0, "")
    assert sum("E" * 300 in line for line in seen) == 2 and not any("\x1b" in line for line in seen)

    ours, theirs = pty.openpty()
    shown = subprocess.Popen(command, stdout=theirs, env={**os.environ, "COLUMNS": "80", "LINES": "24"}, **heard)
    os.close(theirs)
    text = ""
    while text.count("Ctrl-C") < 2:
        text += os.read(ours, 10_000).decode()
    shown.send_signal(signal.SIGINT)
    assert shown.wait(timeout=60) == 0
    os.close(ours)
    assert "\x1b[2J" in text and "\x1b[31mfailed\x1b[0m" in text
    line = next(line for line in text.splitlines() if "EEE" in line)
    assert len(re.sub(r"\x1b\[\d+m", "", line)) == 80
