"""Runs under a real Slurm (tests/slurm/cluster.py): all commands start at once, each test waits for its own."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.launch.commands import TINY, is_the_crash, start, train, wait_for, write_user_source
from tests.slurm import cluster

LAUNCHER = "hydra/launcher=slurm"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "launch.md"
SLOW = ("train.steps=60", "+data.seconds=0.05", "train.eval_interval=null")  # 12 s on one process


class Commands:
    """Command lines of train.py in one directory; `folder` is where they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = write_user_source(folder)
        self.started: dict[str, subprocess.Popen[str]] = {}
        self.pool = ThreadPoolExecutor()

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, name: str, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> None:
        words = (*TINY, self.source, "train.steps=2", f"name={name}", *arguments)
        self.started[name] = start(*words, cwd=self.folder, launcher=launcher)

    def once_stepping(self, name: str, *command: str) -> "Future[Any]":
        """Run `command` as soon as the run is at step 3."""

        def act() -> None:
            wait_for("step 3/", self.run_dir(name) / "logs" / "rank_0.log", timeout=250)
            subprocess.run(command, check=True, capture_output=True, timeout=60)

        return self.pool.submit(act)

    def ended(self, name: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command once it has ended."""
        process = self.started[name]
        stdout, stderr = process.communicate(timeout=300)
        return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    reason = cluster.missing()
    if reason:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "work").mkdir()
    with cluster.running(folder) as configuration, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        runs = Commands(folder / "work")
        _start_all(runs)
        yield runs
        for process in runs.started.values():
            process.kill()
            process.wait()
        runs.pool.shutdown(cancel_futures=True)


def _start_all(runs: Commands) -> None:
    """The slowest first."""
    runs.start("limited", LAUNCHER, *SLOW, "train.steps=1000", "hydra.launcher.timeout_min=1")
    node_2 = ("hydra.launcher.partition=preemptible", "hydra.launcher.nodelist=n2", "hydra.launcher.cpus_per_task=20")
    mark = runs.folder / "urgent_ran"  # 120 s until it is there, so that the job cannot end before it is preempted
    until = ("train.steps=60", "+data.seconds=0.5", f"+data.slow_until={mark}", "train.eval_interval=null")
    runs.start("preempted", LAUNCHER, *until, *node_2)
    # In one node: its tasks would also fit beside the job on n2 and on n1 together.
    urgent = ("--partition=urgent", "--nodes=1", "--nodelist=n2", "--ntasks=20", "--output=/dev/null")
    urgent += (f"--wrap=touch {mark}",)
    runs.once_stepping("preempted", "sbatch", *urgent)
    runs.start("signalled", LAUNCHER, *SLOW, "launch.detach=true")
    runs.once_stepping("signalled", "scancel", "--signal=USR2", "--name=signalled")
    runs.start("sweep", LAUNCHER, "+data.crash_on_rank=null,1,7", "train.num_devices=2")
    runs.start("crash", LAUNCHER, "+data.crash_on_rank=0")
    runs.start("nodes", LAUNCHER, "train.num_nodes=2", "train.num_devices=2", "train.micro_batch_size=1")
    runs.start(
        "stock", "hydra/launcher=submitit_slurm", "+data.crash_on_rank=null,1", "hydra.launcher.tasks_per_node=2"
    )
    for name, arguments in of_the_page():
        runs.start(name, *arguments, "train.num_devices=1")
    srun = ("srun", "--nodes=2", "--ntasks=2", sys.executable)
    runs.start("srun", launcher=srun)
    runs.start("srun_sweep", "hydra.mode=MULTIRUN", "train.seed=1,2", launcher=srun)


def of_the_page() -> list[tuple[str, list[str]]]:
    """(name, arguments) of the commands in docs/launch.md that need a cluster: its sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[2:] for block in blocks for line in block.splitlines()]
    return [
        (next(word.removeprefix("name=") for word in words if word.startswith("name=")), words) for words in commands
    ]


def result(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "result.json").read_text())


def slurm_job(run_dir: Path) -> dict[str, str]:
    """What Slurm says about the job of a run."""
    return described(json.loads((run_dir / "job.json").read_text())["slurm_job_id"])


def described(job_id: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = 200) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def resumed_steps(run_dir: Path) -> list[int]:
    """The steps at which the tasks of a requeued job went on."""
    logs = (path.read_text() for path in (run_dir / "slurm").glob("*_0_log.out"))
    return [int(step) for log in logs for step in re.findall(r"resuming at step (\d+)", log)]


def test_a_detached_command_returns_and_its_directory_is_taken(commands: Commands):
    code, out, err = commands.ended("signalled")
    run_dir = commands.run_dir("signalled")
    job_id = slurm_job(run_dir)["JobId"]
    assert (code, err) == (0, "")
    assert out == f"Slurm job {job_id}: {run_dir}, 1 x 1 processes\n"
    code, _, err = train(*TINY, "name=signalled", LAUNCHER, cwd=commands.folder)
    assert code == 2
    assert re.fullmatch(rf"name: {run_dir} belongs to Slurm job {job_id} \([A-Z]+\); wait for it, .*\n", err)


def test_a_preempted_job_is_requeued_and_resumes_while_the_command_waits(commands: Commands):
    code, _, err = commands.ended("preempted")
    assert (code, err) == (0, "")
    run_dir = commands.run_dir("preempted")
    assert result(run_dir)["step"] == 60
    assert resumed_steps(run_dir) and resumed_steps(run_dir)[0] >= 3
    assert slurm_job(run_dir)["Restarts"] == "1"


def test_a_signal_requeues_a_job(commands: Commands):
    run_dir = commands.run_dir("signalled")
    wait_until(lambda: slurm_job(run_dir)["JobState"] == "COMPLETED", "the job does not come back")
    assert result(run_dir)["step"] == 60
    assert resumed_steps(run_dir) and resumed_steps(run_dir)[0] >= 3
    assert slurm_job(run_dir)["Restarts"] == "1"


def test_four_processes_on_two_nodes_train_as_one_process(commands: Commands):
    code, _, err = commands.ended("nodes")
    assert (code, err) == (0, "")
    run_dir = commands.run_dir("nodes")
    assert (slurm_job(run_dir)["NumNodes"], slurm_job(run_dir)["NumTasks"]) == ("2", "4")
    logs = {path.name: path.read_text() for path in (run_dir / "logs").iterdir()}
    assert sorted(logs) == [f"rank_{rank}.log" for rank in range(4)]
    assert all(f"rank {rank} is local rank {rank % 2}\n" in logs[f"rank_{rank}.log"] for rank in range(4))
    code, _, err = train(*TINY, commands.source, "train.steps=2", "name=one", cwd=commands.folder)
    assert code == 0, err
    expected = result(commands.run_dir("one"))["eval_loss"]
    assert result(run_dir)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert not (commands.run_dir("sweeps/nodes")).exists()  # nothing varies: no sweep


def test_a_raising_rank_fails_its_job_and_the_sweep_but_no_other_point(commands: Commands):
    code, _, err = commands.ended("sweep")
    sweep_dir = commands.run_dir("sweeps/sweep")
    log = sweep_dir / "1" / "logs" / "rank_1.log"
    assert code == 1 and is_the_crash(err, log), err
    assert "the disk\nis full" in log.read_text()
    rows = json.loads((sweep_dir / "sweep.json").read_text())
    assert [(row["overrides"], row["status"]) for row in rows] == [
        (["+data.crash_on_rank=null"], "done"),
        (["+data.crash_on_rank=1"], "failed"),
        (["+data.crash_on_rank=7"], "done"),
    ]
    jobs = [slurm_job(sweep_dir / str(number)) for number in range(3)]
    assert [job["JobState"] for job in jobs] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert jobs[1]["ExitCode"] == "1:0"


def test_a_failed_run_shows_its_traceback(commands: Commands):
    code, out, err = commands.ended("crash")
    log = commands.run_dir("crash") / "logs" / "rank_0.log"
    assert code == 1 and is_the_crash(err, log), err
    assert out.count("\n") == 1  # the job's id


def test_stock_submitit_launcher(commands: Commands):
    """Implies -m as well. Its own idea of failure is a pickled exception; Slurm's, and ours, is the exit code."""
    code, _, err = commands.ended("stock")
    sweep_dir = commands.run_dir("sweeps/stock")
    assert (sweep_dir / "sweep.json").is_file(), err
    rows = json.loads((sweep_dir / "sweep.json").read_text())
    assert [(row["overrides"], row["status"]) for row in rows] == [
        (["+data.crash_on_rank=null"], "done"),
        (["+data.crash_on_rank=1"], "failed"),
    ]
    assert rows[1]["error"].startswith("RuntimeError: the disk is full")
    assert code == 1, err
    assert {path.name for path in (sweep_dir / "0" / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    (array,) = {path.name.split("_")[0] for path in (sweep_dir / ".submitit").glob("*_1")}
    wait_until(lambda: described(f"{array}_1")["JobState"] == "FAILED", "Slurm takes the failed job for a success")
    wait_until(lambda: described(f"{array}_0")["JobState"] == "COMPLETED", "Slurm does not see that a job has ended")


def test_the_commands_of_the_page(commands: Commands):
    names = [name for name, _ in of_the_page()]
    assert len(names) == 3
    for name in names:
        code, _, err = commands.ended(name)
        assert (code, err) == (0, "")
    assert slurm_job(commands.run_dir("cluster"))["NumNodes"] == "2"
    assert len(json.loads((commands.run_dir("sweeps/rates") / "sweep.json").read_text())) == 2


def test_tasks_of_srun_are_ranks(commands: Commands):
    code, out, err = commands.ended("srun")
    assert code == 0, err
    assert out.count("from the start, 2 processes") == 1
    run_dir = commands.run_dir("srun")
    assert result(run_dir)["status"] == "done"
    assert "rank 1 is local rank 0" in (run_dir / "logs" / "rank_1.log").read_text()


def test_a_sweep_in_tasks_of_srun_is_refused(commands: Commands):
    code, _, err = commands.ended("srun_sweep")
    assert code == 2
    assert err.count("hydra.mode: MULTIRUN under srun (WORLD_SIZE=2); run `python train.py -m ... ") == 1
    assert "train.num_nodes=2 train.num_devices=1 hydra/launcher=slurm`" in err


def test_a_job_at_its_time_limit_goes_on_and_a_cancelled_one_does_not(commands: Commands):
    run_dir = commands.run_dir("limited")
    wait_until(lambda: bool(resumed_steps(run_dir)), "the time limit does not requeue the job", timeout=280)
    job_id = slurm_job(run_dir)["JobId"]
    wait_for(f"step {resumed_steps(run_dir)[0] + 2}/", run_dir / "logs" / "rank_0.log", timeout=200)
    subprocess.run(["scancel", job_id], check=True)
    code, _, err = commands.ended("limited")
    assert (code, err) == (75, "")
    assert result(run_dir)["status"] == "stopped"
    assert int(str(result(run_dir)["step"])) > resumed_steps(run_dir)[0]
    assert described(job_id)["JobState"] == "CANCELLED"


def test_datatrove_tokenises_in_jobs(commands: Commands, tmp_path: Path):
    pytest.importorskip("datatrove")
    from bridge.data import text
    from bridge.data.encode import corpus

    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"def f{number}(x): return x + {number}\n" * 20)
    settings = {"executor": "slurm", "tasks": 3, "time": "00:05:00", "partition": "normal"}
    config = text.Config(path=str(tmp_path / "texts"), vocab_size=300, engine=settings)
    text.check(config)
    found, options = text.corpus_of(str(tmp_path / "texts"), key="data.path", field="text"), corpus.Options.of(config)
    in_jobs = corpus.tokenise([found], options, cache=tmp_path / "jobs").prefixes[0]
    here = corpus.tokenise([found], options._replace(engine=None), cache=tmp_path / "here").prefixes[0]
    assert all(Path(f"{here}{s}").read_bytes() == Path(f"{in_jobs}{s}").read_bytes() for s in (".bin", ".idx"))
