"""Whole runs through the real command line: exit codes, signals, sweeps, torchrun."""

import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from bridge.launch import process_tree, spawn
from bridge.runs.result import Result
from tests.launch.commands import ROOT, TINY, is_the_crash, start, train, wait_for, write_user_source

pytestmark = pytest.mark.usefixtures("warm_processes")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def snapshot(folder):
    """When each file below `folder` was written, and how long it is."""
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")}


def test_run_resume_and_refusal(tmp_path):
    """A run to its end; the same command again; another architecture in its directory; a worker's ConfigError."""
    command = (*TINY, "train.steps=2", "name=a")
    run_dir = tmp_path / "runs" / "a"
    code, out, err = train(*command, cwd=tmp_path)
    assert code == 0, err
    assert result(run_dir) | {"eval_loss": None} == {
        "status": "done",
        "step": 2,
        "eval_loss": None,
        "error": None,
        "traceback": None,
        "repeats": False,
        "restarts": 0,
    }
    assert result(run_dir)["eval_loss"] == pytest.approx(math.log(64), rel=0.1)  # random tokens, untrained model
    log = (run_dir / "logs" / "rank_0.log").read_text()
    assert "step 2/2" in log and log in out
    loss = result(run_dir)["eval_loss"]
    export = f"python convert.py mode=export megatron={run_dir} hf={run_dir}/export"
    assert out.endswith(f"next:\n  {export}\n")  # and nothing about generating: random tokens have no tokenizer
    (started,) = [json.loads(line) for line in (run_dir / "environment.jsonl").read_text().splitlines()]
    assert shlex.split(started["command"]) == [str(ROOT / "train.py"), *command]

    code, out, err = train(*command, cwd=tmp_path)
    assert (code, result(run_dir)["step"]) == (0, 2), err
    assert out.splitlines()[0] == f"run {run_dir}: done at step 2 (eval loss {loss:.4f}); nothing left to do"

    before = snapshot(run_dir)
    code, out, err = train(*command, "eval_only=true", cwd=tmp_path)
    assert (code, snapshot(run_dir)) == (0, before), err
    (line,) = (tmp_path / "runs" / "eval.jsonl").read_text().splitlines()
    loss = result(run_dir)["eval_loss"]
    told = {"path": str(run_dir), "step": 2, "eval_loss": loss, "num_samples": 4, "data": "mock"}
    assert json.loads(line) == told | {"eval_perplexity": pytest.approx(math.exp(loss))}
    assert f"eval loss: {loss:.4f} nats per token over 4 samples" in out

    code, _, err = train(*command, "model.num_layers=2", "model.hidden_size=64", cwd=tmp_path)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "model.hidden_size 32 -> 64, model.num_layers 1 -> 2" in err

    code, _, err = train(*TINY, "name=b", f"init.path={run_dir}", "model.num_layers=2", cwd=tmp_path)
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("model.num_layers is 2 (there 1): not the model in ")


def test_the_traceback_of_the_failed_rank_is_shown(tmp_path):
    """Rank 1 fails; rank 0, which then loses its peer, is not what gets reported."""
    source = write_user_source(tmp_path)
    arguments = (*TINY, source, "+data.crash_on_rank=1", "train.num_devices=2", "train.steps=2", "name=a")
    code, _, err = train(*arguments, cwd=tmp_path)
    log = tmp_path / "runs" / "a" / "logs" / "rank_1.log"
    assert code == 1 and is_the_crash(err, log), err
    assert "the disk\nis full" in log.read_text()
    assert result(tmp_path / "runs" / "a")["status"] == "failed"


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_stopped_run_has_saved_and_goes_on(tmp_path, num_devices):
    source = write_user_source(tmp_path)
    command = (*TINY, source, f"train.num_devices={num_devices}", "name=a")
    slow = (*command, "train.steps=1000", "+data.seconds=0.01")
    run_dir = tmp_path / "runs" / "a"
    first = start(*slow, cwd=tmp_path)
    wait_for("step 2/1000", run_dir / "logs" / "rank_0.log")

    code, _, err = train(*slow, cwd=tmp_path)  # a second start meanwhile
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"in use by process {first.pid} " in err

    number = signal.SIGINT if num_devices == 1 else signal.SIGTERM
    first.send_signal(number)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 75
    assert err.startswith(f"{number.name}: saving what was trained, then stopping") and len(err.splitlines()) == 1
    stopped = result(run_dir)
    assert stopped["status"] == "stopped"
    assert f"stopped at step {stopped['step']} ({number.name}); the same command resumes" in out
    steps = stopped["step"] + 1
    code, out, err = train(*slow, f"train.steps={steps}", cwd=tmp_path)
    assert code == 0, err
    assert f"resuming at step {stopped['step']}" in out
    assert result(run_dir)["step"] == steps


def test_workers_do_not_outlive_a_killed_driver(tmp_path):
    source = write_user_source(tmp_path)
    run_dir = tmp_path / "runs" / "a"
    arguments = (*TINY, source, "+data.seconds=0.01", "train.steps=1000", "train.num_devices=2", "name=a")
    driver = start(*arguments, cwd=tmp_path)
    wait_for("step 2/1000", run_dir / "logs" / "rank_0.log")
    tree = psutil.Process(driver.pid).children(recursive=True)
    workers = [process for process in tree if str(run_dir) in process.cmdline()]
    assert len(workers) >= 2
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


def test_interrupting_twice_kills(tmp_path):
    source = write_user_source(tmp_path)
    # One step takes 40 s: the first interrupt cannot be answered before the second.
    arguments = (*TINY, source, "+data.seconds=10", "train.steps=1000", "name=a")
    driver = start(*arguments, cwd=tmp_path)
    wait_for("a slow sample", tmp_path / "runs" / "a" / "logs" / "rank_0.log")
    driver.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(timeout=2)
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=10)
    assert driver.returncode == 75
    assert [line.partition(":")[0] for line in err.splitlines()] == ["SIGINT", "SIGINT again"]
    assert out.splitlines()[-1].startswith("stopped without a save")


def test_a_failing_job_does_not_hide_the_others(tmp_path):
    source = write_user_source(tmp_path)
    command = ("-m", *TINY, source, "train.steps=1", "name=s", "+data.crash_on_rank=0,null", "optimizer.lr=0.1")
    code, out, err = train(*command, cwd=tmp_path)
    sweep_dir = tmp_path / "runs" / "sweeps" / "s"
    assert code == 1
    rows = json.loads((sweep_dir / "sweep.json").read_text())
    assert [(row["job"], row["status"], row["run_dir"]) for row in rows] == [
        (0, "failed", str(sweep_dir / "0")),
        (1, "done", str(sweep_dir / "1")),
    ]
    assert [row["overrides"] for row in rows] == [["+data.crash_on_rank=0"], ["+data.crash_on_rank=null"]]
    assert rows[1]["eval_loss"] == result(sweep_dir / "1")["eval_loss"] > 0
    assert "the disk is full" in err and f"written to {sweep_dir / 'sweep.json'}" in out
    assert "mode=export" not in out  # what can be done next is said of single runs
    assert sorted(path.name for path in sweep_dir.iterdir()) == ["0", "1", "multirun.yaml", "sweep.json"]


def test_a_sweep_minimises_the_evaluation_loss():
    assert Result("done", 3, 1.5).objective == 1.5
    for nothing in (Result("done", 3, None), Result("done", 3, math.nan), Result("failed", 3, 1.5, "x")):
        assert nothing.objective is None


def test_torchrun_ranks_are_the_workers(tmp_path):
    """Both ranks train one run; rank 0 composes; a mistake is printed once and ends both."""
    code, out, err = train(*TINY, "train.steps=2", "name=a", cwd=tmp_path, launcher=TORCHRUN)
    run_dir = tmp_path / "runs" / "a"
    assert code == 0, err
    assert result(run_dir)["status"] == "done"
    assert out.count("from the start, 2 processes") == 1
    assert {path.name for path in (run_dir / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}

    for arguments, message in [
        (("train.num_devices=3",), "train.num_devices: 3 differs from the 2 processes that torchrun started"),
        (("-m", "train.steps=1,2"), "hydra.mode: MULTIRUN under torchrun"),
    ]:
        code, _, err = train(*arguments, *TINY, "name=b", cwd=tmp_path, launcher=TORCHRUN)
        assert code == 1  # torchrun's own, for a rank that left with 2
        assert err.count(message) == 1
    assert not (tmp_path / "runs" / "b").exists()


def test_torchrun_on_two_nodes(tmp_path):
    """One run directory, decided by rank 0 of all; local ranks count from 0 on each node."""
    source = write_user_source(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        endpoint = f"127.0.0.1:{reserved.getsockname()[1]}"
    rendezvous = ("--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}")
    launcher = (sys.executable, "-m", "torch.distributed.run", *rendezvous)
    arguments = (*TINY, source, "train.micro_batch_size=1", "train.steps=1", "name=a")
    nodes = [start(*arguments, cwd=tmp_path, launcher=launcher) for _ in range(2)]
    outputs = [node.communicate(timeout=180) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(out.count("from the start, 4 processes") for out, _ in outputs) == 1
    run_dir = tmp_path / "runs" / "a"
    assert result(run_dir)["status"] == "done"
    for rank in range(4):
        log = (run_dir / "logs" / f"rank_{rank}.log").read_text()
        assert f"rank {rank} is local rank {rank % 2}\n" in log


def test_submitit_local_launcher(tmp_path):
    """Implies -m; its tasks are the ranks; a failing rank fails its job, not the other one."""
    source = write_user_source(tmp_path)
    tasks = ("hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2")
    code, _, err = train(*TINY, source, *tasks, "train.steps=1", "+data.crash_on_rank=1,null", "name=s", cwd=tmp_path)
    sweep_dir = tmp_path / "runs" / "sweeps" / "s"
    rows = json.loads((sweep_dir / "sweep.json").read_text())
    assert code == 1, err
    assert [(row["overrides"], row["status"]) for row in rows] == [
        (["+data.crash_on_rank=1"], "failed"),
        (["+data.crash_on_rank=null"], "done"),
    ]
    assert rows[0]["error"].startswith("RuntimeError: the disk is full")
    assert {path.name for path in (sweep_dir / "1" / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}


def test_processes_that_are_not_torchruns_meet_too(tmp_path, monkeypatch):
    """RANK and WORLD_SIZE from elsewhere: rank 0 serves the store itself. A mistake ends both with 2."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(20000 + os.getpid() % 10000))
    processes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        processes.append(start("train.stpes=2", cwd=tmp_path))
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert errors[0].startswith("train.stpes: no such key") and errors[1] == ""


def test_jobs_of_a_launcher_stop_with_the_command_and_do_not_outlive_it(tmp_path):
    """submitit's local launcher has two processes between the command and each worker. SIGTERM saves, SIGKILL ends."""
    source = write_user_source(tmp_path)
    sweep_dir = tmp_path / "runs" / "sweeps" / "s"
    slow = ("hydra/launcher=submitit_local", "+data.seconds=0.01", "train.steps=1000", "name=s", "train.seed=1,2")

    def started(sign: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        driver = start(*TINY, source, *slow, cwd=tmp_path)
        for number in (0, 1):
            wait_for(sign, sweep_dir / str(number) / "logs" / "rank_0.log")
        return driver, psutil.Process(driver.pid).children(recursive=True)

    driver, below = started("step 2/1000")
    driver.terminate()
    out, err = driver.communicate(timeout=60)
    assert (driver.returncode, err) == (75, "SIGTERM: saving what was trained, then stopping\n")
    rows = json.loads((sweep_dir / "sweep.json").read_text())
    assert [row["status"] for row in rows] == ["stopped"] * 2 and all(row["step"] >= 2 for row in rows)
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["0", "stopped"], ["1", "stopped"]]
    assert psutil.wait_procs(below, timeout=20)[1] == []

    driver, below = started("resumed from")
    assert sum(process_tree.runs(process, spawn.WORKER) for process in below) >= 2
    driver.kill()
    driver.wait()
    assert psutil.wait_procs(below, timeout=20)[1] == []
