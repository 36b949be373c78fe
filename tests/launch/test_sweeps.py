"""Sweepers through the driver: a grid, and Optuna's with failed trials and reruns. One test trains, in the others jobs
end at once."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from hydra.errors import MissingConfigException
from hydra.experimental.callback import Callback

from bridge import status, sweep_report
from bridge.launch import compose, driver, hydra_errors, spawn, world
from bridge.launch import sweep as sweeps
from bridge.runs import read
from bridge.runs.result import Result, read_result, write_result
from tests.launch.commands import TINY, train, write_user_source

pytestmark = pytest.mark.usefixtures("warm_processes")
# Optuna with a learning rate from 1e-4 to 1e-2; job 0 of the seed that is set has 2.4e-4, the others more than 3e-4.
OPTUNA = ("hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-2))")


class Swept:
    """Runs `train.py -m` in this process. Jobs end at once, with a loss that is lowest at a learning rate of 2.5e-3."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        self.directory = folder / "runs" / "sweeps" / "s"
        self.trained: list[int] = []  # numbers of the jobs that were not skipped
        self.failing_below = 0.0
        self.stopping_at: int | None = None
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setattr(spawn, "run_workers", self.run_workers)

    def run_workers(self, claim, **_) -> Result:
        lr = yaml.safe_load((claim.path / "config.yaml").read_text())["optimizer"]["lr"]
        name = claim.path.name
        self.trained.append(int(name) if name.isdigit() else len(self.trained))
        if self.stopping_at in self.trained:
            result = Result("stopped", 1)
        elif lr < self.failing_below:
            result = Result("failed", 1, error=f"FloatingPointError: lr {lr}")
        else:
            result = Result("done", 2, math.nan if lr > 3.5e-3 else (math.log(lr) + 6) ** 2)
        write_result(result, claim.path)
        return read_result(claim.path)

    def __call__(self, *arguments: str, multirun: bool = True) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        flags = ["-m"] if multirun else []
        command = ["train.py", *flags, *TINY, "train.steps=2", "optimizer.min_lr=0", "name=s", *arguments]
        self.monkeypatch.setattr(sys, "argv", command)
        self.trained = []
        with pytest.raises(SystemExit) as leaving:
            driver.main()
        return int(leaving.value.code or 0), *self.capsys.readouterr()

    def rows(self) -> list[dict]:
        return json.loads((self.directory / "sweep.json").read_text())

    def best(self) -> dict:
        return yaml.safe_load((self.directory / "optimization_results.yaml").read_text())


def learning_rate(row: dict) -> float:
    return float(row["overrides"][0].removeprefix("optimizer.lr="))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Swept:
    return Swept(tmp_path, monkeypatch, capsys)


def composed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[compose.Composed]:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
    return compose.jobs("train")


@pytest.mark.parametrize(
    ("argument", "swept"),
    [
        ("model=glob(llama3_1_*)", ["model=llama3_1_70b", "model=llama3_1_8b"]),
        ("train.seed=range(1,4)", ["train.seed=1", "train.seed=2", "train.seed=3"]),
        ("optimizer=choice(adam,sgd)", ["optimizer=adam", "optimizer=sgd"]),
    ],
)
def test_hydras_ways_to_name_several_values(argument, swept, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = composed([argument], monkeypatch)
    assert [job.swept for job in jobs] == [(each,) for each in swept]


def test_a_value_that_sweepers_write_otherwise_is_not_swept(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = composed(["optimizer.lr=1e-3", "+data.note='a b'", "train.seed=1,2"], monkeypatch)
    assert "optimizer.lr=0.001" in jobs[0].overrides
    assert [job.swept for job in jobs] == [("train.seed=1",), ("train.seed=2",)]


def test_a_grid_runs_again_only_what_is_not_done(sweep):
    sweep.failing_below = 1e-3
    grid = "optimizer.lr=5e-4,2e-3,5e-3"
    assert sweep(grid)[0] == 1
    assert (sweep.trained, [row["status"] for row in sweep.rows()]) == ([0, 1, 2], ["failed", "done", "done"])
    sweep.failing_below = 0.0
    code, out, _ = sweep(grid)
    assert (code, sweep.trained, [row["status"] for row in sweep.rows()]) == (0, [0], ["done"] * 3)
    assert out.count("done in an earlier start; remove the directory to run it again") == 2
    assert sweep(grid, "train.steps=3")[0] == 0  # another configuration
    assert sweep.trained == [0, 1, 2]


def test_failed_trials_and_a_rerun(sweep):
    """Neither a failing job nor one whose loss is NaN ends Optuna's sweep or is its best; a rerun repeats none."""
    sweep.failing_below = 3e-4
    code, _, err = sweep(*OPTUNA, "hydra.sweeper.n_trials=4")
    rows = sweep.rows()
    assert (code, sweep.trained) == (1, list(range(4)))
    assert (
        rows[0]["status"] == "failed"
        and "FloatingPointError: lr 0.0002" in rows[0]["error"]
        and rows[0]["error"] in err
    )
    diverged = [row for row in rows if row["status"] == "done" and row["eval_loss"] is None]
    assert diverged and all(learning_rate(row) > 3.5e-3 for row in diverged)
    best = min((row for row in rows if row["eval_loss"] is not None), key=lambda row: row["eval_loss"])
    assert sweep.best()["best_value"] == best["eval_loss"]
    assert sweep.best()["best_params"] == {"optimizer.lr": learning_rate(best)}

    # The same command: the same suggestions. What has failed stays so, since the suggestions after it rest on that.
    sweep.failing_below = 0.0
    code, out, _ = sweep(*OPTUNA, "hydra.sweeper.n_trials=5")
    assert (code, sweep.trained, sweep.rows()[:4]) == (1, [4], rows)
    assert out.count("failed in an earlier start; remove the directory to run it again") == 1

    # A job that was cut short runs again; with another seed the directories hold other jobs.
    (sweep.directory / "3" / "result.json").unlink()
    assert sweep(*OPTUNA, "hydra.sweeper.n_trials=4")[0] == 1 and sweep.trained == [3]
    code, _, err = sweep(*OPTUNA, "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=7")
    (line,) = [line for line in err.splitlines() if line.startswith("name: ")]
    held = f"{sweep.directory / '0'} holds the job 'optimizer.lr={learning_rate(rows[0])}'"
    assert code == 2 and sweep.trained == [] and held in line and "give this sweep another name=" in line
    assert len(sweep.rows()) == 4  # the earlier sweep's


def test_a_sweep_without_a_completed_trial(sweep):
    sweep.failing_below = 1.0
    code, out, err = sweep(*OPTUNA, "hydra.sweeper.n_trials=2", "hydra/sweeper/sampler=random")
    assert code == 1 and [row["status"] for row in sweep.rows()] == ["failed", "failed"]
    assert "written to" in out and "No trials are completed" not in err


def test_a_user_may_end_the_sweep_at_a_failure(sweep):
    sweep.failing_below = 3e-4
    code, _, err = sweep(*OPTUNA, "hydra.sweeper.n_trials=6", "hydra.sweeper.max_failure_rate=0")
    assert code == 1 and sweep.trained == [0]
    assert "FloatingPointError: lr 0.0002" in err


def test_a_study_that_is_kept_goes_on_under_another_name(sweep):
    keep = ("hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=lr", "hydra.sweeper.n_trials=2")
    rates = ("hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,3e-3))")  # not one without a finite loss
    assert sweep(*rates, *keep)[0] == 0
    first = sweep.best()["best_value"]
    code, _, err = sweep(*rates, *keep)
    assert code == 2 and "give this sweep another name=" in err
    sweep.directory = sweep.directory.with_name("more")
    assert sweep(*rates, *keep, "name=more")[0] == 0 and sweep.trained == [0, 1]
    assert sweep.best()["best_value"] <= first


@pytest.mark.parametrize("storage", ["null", "sqlite:///study.db"])
def test_the_table_tells_that_all_trials_failed(sweep, storage):
    sweep.failing_below = 1.0
    code, out, _ = sweep(*OPTUNA, f"hydra.sweeper.storage={storage}", "hydra.sweeper.n_trials=2")
    assert code == 1 and sweep.trained == [0, 1]
    assert out.splitlines()[-2].endswith("sweep.json")
    assert out.splitlines()[-1] == f"next: python -m bridge.sweep_report {sweep.directory}"


def test_optuna_that_is_missing():
    missing = MissingConfigException("", missing_cfg_file="hydra/sweeper/optuna", options=["basic"])
    message = "hydra/sweeper: no option 'optuna'; it needs a package that is missing: pip install 'bridge[sweep]'"
    assert hydra_errors.one_line(missing) == message


@pytest.mark.parametrize(
    ("wandb", "group"),
    [
        ({"project": "p", "group": None}, "s"),
        ({"project": "p", "group": "mine"}, "mine"),
        ({"project": None, "group": None}, None),
    ],
)
def test_wandb_shows_the_jobs_of_a_sweep_as_a_group(wandb, group):
    settings = {"runs_dir": "runs", "name": "s", "log": {"log_interval": 5, "wandb": wandb}}
    directory = Path("runs/sweeps/s").absolute()
    job = compose.Composed(settings, [], 0, directory=directory / "0", sweep_directory=directory)
    placed = sweeps.placed(settings, job)
    assert placed["log"] == {"log_interval": 5, "wandb": wandb | {"group": group}}
    assert settings["log"]["wandb"] is wandb and placed["name"] == "sweeps/s/0"


def test_a_real_sweep_its_status_and_report(tmp_path, capsys):
    """A trial that is done and one that fails, trained for real through the command line."""
    command = (*TINY, write_user_source(tmp_path), "train.steps=3", "train.eval_interval=1", "name=s")
    search = (
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "+data.crash_on_rank=choice(0,9)",
        "hydra.sweeper.sampler.seed=0",
    )
    code, _, err = train("-m", *command, *search, cwd=tmp_path)
    directory = tmp_path / "runs" / "sweeps" / "s"
    rows = json.loads((directory / "sweep.json").read_text())
    assert code == 1, err
    done, failed = sorted(rows, key=lambda row: row["status"])
    assert (done["status"], failed["status"]) == ("done", "failed")
    assert (done["overrides"], failed["overrides"]) == (["+data.crash_on_rank=9"], ["+data.crash_on_rank=0"])
    assert yaml.safe_load((directory / "optimization_results.yaml").read_text())["best_value"] == done["eval_loss"]

    assert status.main([str(tmp_path / "runs")]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    first, second = (lines[f"sweeps/s/{row['job']}"] for row in (done, failed))
    assert " done " in first and " 3/3 " in first and f" {done['eval_loss']:.4f} " in first
    assert " failed " in second and "the disk is full" in second
    assert sweep_report.main([str(directory)]) == 0
    page = (directory / "report.html").read_text()
    assert '"keys":["data.crash_on_rank"]' in page and f'"eval_loss":{done["eval_loss"]}' in page


def test_all_points_of_a_grid_are_checked_before_the_first_is_trained(sweep):
    code, out, err = sweep("optimizer.lr=1e-3,bad", "parallelism.tensor_model_parallel_size=1,3")
    lines = err.splitlines()
    assert (code, out, sweep.trained) == (2, "", [])
    assert [line.partition(": ")[0] for line in lines] == [
        "job 1 (optimizer.lr=0.001 parallelism.tensor_model_parallel_size=3)",
        "job 2 (optimizer.lr=bad parallelism.tensor_model_parallel_size=1)",
        "job 3 (optimizer.lr=bad parallelism.tensor_model_parallel_size=3)",
    ]
    assert "): parallelism.tensor_model_parallel_size: " in lines[0] and "): optimizer.lr: bad" in lines[1]
    done = sweep.directory / "1" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert sweep("optimizer.lr=1e-3,2e-3")[0] == 0
    done.parent.mkdir()
    done.write_text("2")
    code, _, err = sweep("optimizer.lr=1e-3,2e-3", "train.steps=1")
    assert (code, sweep.trained, len(err.splitlines())) == (2, [], 1)
    assert err.startswith("job 1 (optimizer.lr=0.002): train.steps: 1, but ")
    shutil.rmtree(sweep.directory)
    code, _, err = sweep("model=tiny,no_such")
    assert code == 2 and "job 1 (model=no_such): model: no option 'no_such'" in err
    code, _, err = sweep("optimizer.lr=")
    assert (code, len(err.splitlines())) == (2, 1) and err.startswith("optimizer.lr: ")
    code, _, err = sweep("optimizer.lr=1e-3,2e-3", "train.stpes=3")
    assert (code, len(err.splitlines())) == (2, 1) and err.startswith("train.stpes: no such key ")
    code, _, err = sweep("train.seed=range(-12,2)")
    assert (code, len(err.splitlines())) == (2, 11) and err.splitlines()[-1].startswith("... and 2 more jobs ")
    assert not sweep.directory.exists()


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (("optimizer.lr=1e-3,2e-3", "name=n_${optimizer.lr}"), "name: the jobs of a sweep share one directory"),
        (("model=tiny,gpt2", "name=${choice:model}"), "name: the jobs of a sweep share one directory"),
        (("optimizer.lr=1e-3,2e-3", "runs_dir=r/${optimizer.lr}"), "hydra.sweep.dir: the jobs of a sweep share one"),
        (("optimizer.lr=1e-3,2e-3", "hydra.sweep.subdir=x"), "hydra.sweep.subdir: 'x' would be the directory of job 0"),
        (("optimizer.lr=1e-3,2e-3", "hydra.sweep.subdir='${hydra.job.num} x'"), "job 0 (optimizer.lr=0.001): hydra."),
    ],
)
def test_directories_that_a_sweep_cannot_have(sweep, arguments, start, tmp_path):
    code, out, err = sweep(*arguments)
    assert (code, out, sweep.trained) == (2, "", []) and err.startswith(start), err
    assert list(tmp_path.iterdir()) == []


def test_job_directories_named_after_their_overrides(sweep, tmp_path):
    """Hydra's documented example, with its documented way to leave keys out."""
    keys = {word.partition("=")[0] for word in TINY} - {"scheduler.lr_warmup_steps"}
    keys |= {"name", "train.steps", "optimizer.min_lr"}
    exclude = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(keys))}]"
    grid = ("optimizer.lr=1e-3,2e-3", "hydra.sweep.subdir=${hydra.job.override_dirname}", exclude)
    assert sweep(*grid)[0] == 0
    first, second = (Path(row["run_dir"]).name for row in sweep.rows())
    assert "optimizer.lr=0.001,scheduler.lr_warmup_steps=0" in first and "optimizer.lr=0.002" in second
    found = {run.path.name: run.state for run in read.find(tmp_path / "runs")}
    assert found == {first: "done", second: "done"}
    assert sweep(*grid)[0] == 0 and sweep.trained == []
    (elsewhere := tmp_path / "moved").mkdir()
    moved = sweep.directory.rename(elsewhere / "s")
    assert {run.path for run in read.find(elsewhere)} == {moved / first, moved / second}


def test_a_dry_run_of_a_sweep_writes_nothing(sweep, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(driver, "_dry_run", lambda config, **_: shown.append(config.optimizer["lr"]) or Result("done"))
    code, out, _ = sweep("optimizer.lr=1e-3,2e-3", "dry_run=true")
    assert (code, shown, sweep.trained) == (0, [1e-3, 2e-3], [])
    assert out.splitlines() == ["--- job 0: optimizer.lr=0.001", "--- job 1: optimizer.lr=0.002"]
    code, _, err = sweep(*OPTUNA, "dry_run=true")
    assert code == 2 and err.startswith("dry_run: true, but OptunaSweeper chooses jobs by the results of earlier ones")
    assert list(tmp_path.iterdir()) == []


def test_jobs_that_a_stopped_sweep_did_not_start(sweep):
    sweep.stopping_at = 1
    code, out, _ = sweep("optimizer.lr=1e-3,2e-3,3e-3")
    assert (code, sweep.trained) == (75, [0, 1])
    assert [row["status"] for row in sweep.rows()] == ["done", "stopped", "pending"]
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("2 ")] == [["2", "pending"]]


class Told(Callback):
    """A callback of a user's own."""

    ends: ClassVar[list[tuple[str, object]]] = []

    def on_job_end(self, config, job_return, **_) -> None:
        told = job_return._return_value
        Told.ends.append((job_return.status.name, told if job_return.status.name == "COMPLETED" else str(told)))


def test_hydras_callbacks_are_told_how_a_job_ended(sweep):
    Told.ends.clear()
    callback = f"+hydra.callbacks.told._target_={__name__}.Told"
    assert sweep(callback, "optimizer.lr=2e-3", multirun=False)[0] == 0
    loss = (math.log(2e-3) + 6) ** 2
    sweep.failing_below = 1e-3
    code, _, err = sweep(callback, "optimizer.lr=1e-4", "name=t", multirun=False)
    assert (code, err) == (1, "FloatingPointError: lr 0.0001\n")
    code, _, err = sweep(callback, "train.steps=none_at_all", multirun=False)
    assert (code, len(err.splitlines())) == (2, 1)
    assert sweep(callback, "optimizer.lr=1e-4,2e-3")[0] == 1 and sweep.trained == [0, 1]
    assert [status for status, _ in Told.ends] == ["COMPLETED", "FAILED", "FAILED", "FAILED", "COMPLETED"]
    assert Told.ends[0] == Told.ends[4] == ("COMPLETED", loss)
    assert Told.ends[1][1] == "FloatingPointError: lr 0.0001" and str(Told.ends[2][1]).startswith("train.steps: ")


@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize("launcher", ["slurm", "submitit_slurm"])
def test_a_launcher_of_slurm_where_there_is_none(sweep, monkeypatch, launcher, multirun, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = sweep(f"hydra/launcher={launcher}", multirun=multirun)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"hydra/launcher: {launcher} needs srun, which is not on the PATH")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("launcher", ["slurm", "submitit_slurm"])
def test_what_sbatch_refuses_is_one_line(sweep, monkeypatch, launcher, tmp_path):
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, _, err = sweep(f"hydra/launcher={launcher}", "hydra.launcher.partition=x", "optimizer.lr=1e-3,2e-3")
    assert code == 2
    assert err.splitlines()[-1].startswith("hydra.launcher: sbatch: error: invalid partition specified: x; set ")
    assert "Traceback" not in err


def test_a_directory_for_hydra_that_would_stay_empty(sweep, tmp_path):
    away = f"hydra.run.dir={tmp_path / 'away'}"
    code, _, err = sweep(away, multirun=False)
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"hydra.run.dir: {tmp_path / 'away'} would stay empty") and "set runs_dir and name" in err
    assert list(tmp_path.iterdir()) == []
    assert sweep(away, "hydra.job.chdir=true", multirun=False)[0] == 0
    assert [run.path for run in read.find(tmp_path)] == [tmp_path / "away" / "runs" / "s"]


def test_ctrl_c_where_nothing_runs_is_one_line(sweep, monkeypatch):
    def interrupt(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "check_layout", interrupt)
    assert sweep("optimizer.lr=1e-3", multirun=False) == (130, "", "SIGINT: stopped; no run was in progress\n")
