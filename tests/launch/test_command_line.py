"""What the command line costs, prints and refuses, before any worker starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.config_repository import CachingConfigRepository

from bridge.launch import compose, convert, driver
from tests.launch.commands import ROOT


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("driver", ["--help"]),
        ("driver", ["--cfg", "job", "--resolve"]),
        ("driver", ["--info", "defaults"]),
        ("driver", ["train.steps=x"]),
        ("convert", ["--help"]),
        ("convert", ["--cfg", "job"]),
    ],
)
def test_composing_imports_no_torch(command: str, arguments: list[str]):
    code = (
        f"import atexit, sys; sys.argv[0] = 'train.py'; from bridge.launch.{command} import main; "
        "atexit.register(lambda: print('heavy:', {'torch', 'megatron', 'transformers'} & set(sys.modules))); main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert "heavy: set()" in done.stdout


def run_in_process(
    command, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys, *, full_error: str = "0"
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", full_error)
    with pytest.raises(SystemExit) as leaving:
        command()
    return int(leaving.value.code or 0), *capsys.readouterr()


def test_help_lists_groups_and_main_keys(monkeypatch, capsys):
    copies, copy = [], CachingConfigRepository.__init__
    monkeypatch.setattr(CachingConfigRepository, "__init__", lambda *args: copies.append(1) or copy(*args))
    code, out, _ = run_in_process(driver.main, ["--help"], monkeypatch, capsys)
    assert code == 0
    assert len(copies) == 1  # for the composition itself
    assert all(f"\n{group}: " in out for group in ("model", "parallelism", "optimizer", "precision", "peft", "data"))
    assert "train.steps" in out and "init.path" in out and "75" in out
    assert "qwen3_0_6b" in out and max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.stpes=3", "train.stpes: no such key (train.stpes=3); did you mean 'train.steps'?"),
        ("log.wandb.projec=x", "log.wandb.projec: no such key (log.wandb.projec=x); did you mean 'log.wandb.project'?"),
        ("modle=tiny", "modle: no such group or key (modle=tiny); did you mean 'model'?"),
        ("model=tinny", "model: no option 'tinny'; did you mean 'tiny'?"),
        ("precision=int3", "precision: no option 'int3'; the options are bf16, fp16, fp32"),
        ("recipe=nothing_like_it", "recipe: no option 'nothing_like_it'"),
        ("+train.typo=1", "train.typo: "),
        ("++log.wandb.typo=1", "log.wandb.typo: "),
        ("+typo.deep=1", "typo: "),
        ("model.hidden_sise=3", "model.hidden_sise: "),
        ("+train.seed=3", "train.seed: is already set, so '+train.seed=3' adds nothing; write it without the '+'"),
        ("+model=tiny", "model: is chosen twice; write model=option without a '+'"),
        (
            "train.steps=1,2",
            "train.steps: '1,2' gives one run several values; add -m to run them all",
        ),
        ("train.steps=[1", "train.steps=[1: not a valid override; write a list as"),
        ("train.steps", "train.steps: has no value; write train.steps=VALUE, without spaces around the '='"),
        (
            "init.path=/a/x=1",
            "init.path: '/a/x=1' has characters that Hydra reads as its own; write 'init.path=\"/a/x=1\"'",
        ),
        ("data.split=90,10", "data.split: '90,10' is read as a number or several; write 'data.split=\"90,10\"' for "),
        (
            "train.exit_after=30",
            "train.exit_after: 30 is not a duration; a number needs its unit: train.exit_after=30s ",
        ),
        ("name=1e3", "name: '1e3' is read as a number or several; write 'name=\"1e3\"' for a text"),
        ("lr=1e-3", "lr: no such group or key (lr=1e-3); write optimizer.lr=1e-3"),
        ("+lr=1e-3", "lr: unknown key (value 0.001); write optimizer.lr=0.001"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key (value 1); write optimizer.lr=1"),
        ("optimizer.lr=", "optimizer.lr: has no value; write optimizer.lr=VALUE"),
        ("precision=16", "precision=16: no option of a group; precision=fp16 trains in float16"),
        ("model=/a/model/x.yaml", "model: '/a/model/x.yaml' is a file, not an option; write --config-dir /a model=x"),
        (
            "experiment=one",
            "experiment: no option 'one'; put experiment/one.yaml into the directory of --config-dir DIR",
        ),
        ("train.steps=many", "train.steps: many"),
        ("train=3", "train: 3 is not a section"),
        ("~train.nothing", "train.nothing: cannot be deleted, it does not exist"),
        ("~train.stps", "train.stps: cannot be deleted, it does not exist; did you mean 'train.steps'?"),
        ("~checkpoint.keep_last", "checkpoint.keep_last: is null already; leave '~checkpoint.keep_last' out"),
        ("~train.seed=5", "train.seed: is 1234, so that '~train.seed=5' deletes nothing; write '~train.seed'"),
        ("~model=gpt2", "model: '~model=gpt2' is not the option that is chosen; write model=OPTION for an"),
        ("~model", "model.family: is missing; choose a model"),
        ("name=${nothing}", "name: Interpolation key 'nothing' not found"),
        ("name=???", "name: has no value; set name=..."),
        ("name=../elsewhere", "name: '../elsewhere'"),
        ("hydra/launcher=nothing", "hydra/launcher: no option 'nothing'"),
        ("--config-dir=/nothing/here", "Additional config directory '/nothing/here' not found"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argument, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_in_process(driver.main, [argument], monkeypatch, capsys)
    assert code == 2
    assert err.startswith(message)
    assert len(err.splitlines()) == 1
    assert out == ""
    assert "use +" not in err
    assert list(tmp_path.iterdir()) == []  # no run directory, nothing of Hydra's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.steps=2", "--lr", "1e-3"], "--lr: no such flag; write optimizer.lr=1e-3"),
        (
            ["-m", "data.split=90,10"],
            "data.split: '90,10' is read as a number or several; write 'data.split=\"90,10\"' for",
        ),
        (
            ["-m", "experiment=choice(a)"],
            "experiment: no option 'a'; put experiment/a.yaml into the ",
        ),
        (["-m", "optimizer.lr="], "optimizer.lr: has no value; write optimizer.lr=VALUE"),
        (
            ["--config-path", "{dir}", "--config-name", "mine"],
            "--config-path: {dir} replaces the shipped files, but has no train.yaml; write --config-dir {dir}",
        ),
        (["--config", "a/x.yaml"], "--config: no such flag; write --config-dir a --config-name x, "),
        (["--config-path", "/nothing/here"], "--config-path: '/nothing/here' is not a directory"),
        (["--cfg"], "--cfg/-c: expected one argument; --hydra-help lists all flags"),
        (["--config-dir", "a", "x=1", "--config-dir=b"], "--config-dir: is given twice; "),
        (["-m", "train.steps=1,2", "--cfg", "job"], "Only one of --run, --multirun, --cfg, "),
        (["-m", "train.steps=1,2", "train.steps=3"], "train.steps: is given by 'train.steps=3' after "),
        (["-m", "train.steps=1,2", "train={seed: 3}"], "train: is given by 'train={seed: 3}' after 'train.steps=1,2'"),
        (["-m", "train={steps: 1},{steps: 2}", "train={seed: 3}"], "train: is given by 'train={seed: 3}' after "),
        (
            ["-m", "hydra.sweeper.params={train.steps: choice(1,2)}"],
            "hydra.sweeper.params: several values for train.steps need quotes inside {...}; write ",
        ),
        (["-m", "hydra.sweeper.max_batch_size=0"], "configuration: cannot be composed (AssertionError: assert max_b"),
        (["-m", "hydra.launcher=null"], "configuration: cannot be composed (RuntimeError: Hydra launcher is not "),
        (["hydra.launcher=null"], "Input cfg is not an OmegaConf config object"),
        (["-m", "hydra.job.env_set=${hydra:job.num}"], "configuration: cannot be composed (TypeError: 'int' object "),
        (["hydra.verbose=[1,2]"], "configuration: cannot be composed (TypeError: A logger name must be a string)"),
    ],
)
def test_mistakes_with_flags_and_sweeps_are_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\n")
    arguments = [argument.replace("{dir}", str(tmp_path)) for argument in arguments]
    code, _, err = run_in_process(driver.main, arguments, monkeypatch, capsys)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert err.startswith(message.replace("{dir}", str(tmp_path)))


def test_full_errors_are_tracebacks_when_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments in (["train.stpes=3"], ["train.steps=x"], ["-m", "train.steps=x,y"]):
        code, _, err = run_in_process(driver.main, arguments, monkeypatch, capsys, full_error="1")
        assert code != 0
        assert "Traceback (most recent call last):" in err.splitlines()[:2]  # after the line of the first wrong job
        assert "train.st" in err.splitlines()[-1]
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_conversions_one_after_the_other_leave_nothing_of_hydras(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_in_process(convert.main, ["-m", "mode=yaml", "hf=a,b"], monkeypatch, capsys)
    assert code == 2 and err.startswith(f"hf: {tmp_path}/a does not exist; ")
    assert list(tmp_path.iterdir()) == []


def test_convert_checks_its_keys_the_same_way(monkeypatch, capsys):
    for arguments, message in [
        ([], "mode: has no value"),
        (["mode=imprt"], "mode: imprt"),
        (["mode=yaml", "hff=x"], "hff: no such group or key (hff=x); did you mean 'hf'?"),
        (["mode=import", "hf=x"], "megatron: "),
    ]:
        code, _, err = run_in_process(convert.main, arguments, monkeypatch, capsys)
        assert (code, len(err.splitlines())) == (2, 1)
        assert err.startswith(message)


@pytest.mark.parametrize("arguments", [["train.py", "dry_run=true"], ["convert.py", "mode=yaml", "hf=hf"]])
def test_a_reader_that_has_gone_costs_no_traceback(arguments: list[str], tmp_path: Path):
    """As with `| head -1`."""
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64, "vocab_size": 64}))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "standard output was closed by its reader; stopping\n")


def composed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[compose.Composed]:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return compose.jobs("train")


def test_architecture_sections_take_unlisted_keys_without_a_plus(monkeypatch):
    overrides = ["model.moe_router_topk=2", "model.rope_parameters.factor=8", "optimizer.foreach=true"]
    (job,) = composed(overrides, monkeypatch)
    assert job.settings["model"]["moe_router_topk"] == 2
    assert job.settings["model"]["rope_parameters"] == {"factor": 8}
    assert job.overrides == overrides


def test_groups_and_recipes_of_the_users_own(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("family: llama\nnum_layers: 7\n")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "night.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: mine\ntrain:\n  steps: 5\n"
    )
    (job,) = composed([f"--config-dir={tmp_path}", "recipe=night"], monkeypatch)
    assert (job.settings["model"], job.settings["train"]["steps"]) == ({"family": "llama", "num_layers": 7}, 5)
    assert job.settings["name"] == "mine"


def test_sweep_jobs_have_directories_and_know_what_varies(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = composed(["-m", "optimizer.lr=0.1,0.2", "train.seed=3"], monkeypatch)
    assert [job.number for job in jobs] == [0, 1]
    assert [job.swept for job in jobs] == [("optimizer.lr=0.1",), ("optimizer.lr=0.2",)]
    assert [job.directory for job in jobs] == [tmp_path / "runs" / "sweeps" / "tiny" / n for n in "01"]


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    settings = {"runs_dir": "runs", "init": {"path": "~/hf"}, "data": {"paths": ["a", "/b"], "cache_dir": None, "n": 1}}
    assert compose.absolute(settings, names=frozenset({"runs_dir", "path", "paths"})) == {
        "runs_dir": str(tmp_path / "runs"),
        "init": {"path": "/home/me/hf"},
        "data": {"paths": [str(Path(tmp_path) / "a"), "/b"], "cache_dir": None, "n": 1},
    }


def chosen(job: compose.Composed) -> tuple[int, int, float]:
    train = job.settings["train"]
    return train["steps"], train["global_batch_size"], job.settings["optimizer"]["lr"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "recipe=night", "train.steps=5,6", "--config-dir", "{dir}"],
        ["recipe=night", "-m", "train.steps=5,6", "--config-dir", "{dir}"],
        ["recipe=night", "--config-dir={dir}", "train.steps=5,6", "--multirun"],
        ["+recipe=night", "train.steps=5,6", "-cd", "{dir}", "-m"],
    ],
)
def test_flags_may_stand_anywhere(arguments, monkeypatch, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "night.yaml").write_text("# @package _global_\ntrain:\n  global_batch_size: 64\n")
    monkeypatch.chdir(tmp_path)
    jobs = composed([argument.format(dir=tmp_path) for argument in arguments], monkeypatch)
    assert [chosen(job)[:2] for job in jobs] == [(5, 64), (6, 64)]
    assert [job.swept for job in jobs] == [("train.steps=5",), ("train.steps=6",)]


def test_cfg_may_stand_last(monkeypatch, capsys):
    code, out, _ = run_in_process(driver.main, ["train.steps=5", "--cfg", "job", "-p", "train"], monkeypatch, capsys)
    assert code == 0
    assert out.startswith("# @package train\nsteps: 5\n")


@pytest.mark.parametrize(
    "overrides",
    [
        ["train={steps: 2}", "train={global_batch_size: 4}"],
        ["++train={steps: 2}", "++train={global_batch_size: 4}"],
        ["+train={steps: 9, seed: 3}", "train.steps=2", "+train={global_batch_size: 4}"],
        ["train={steps: 2}", "train.steps=3", "train={steps: 2}", "train={global_batch_size: 4}"],
        ["train.steps=2", "train={steps: 3, global_batch_size: 4}", "train.steps=2"],
        ["train.steps=3", "train={global_batch_size: 4}", "train.steps=2"],
    ],
)
def test_a_key_given_twice_means_in_a_sweep_what_it_means_in_a_run(overrides, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (single,) = composed(overrides, monkeypatch)
    assert chosen(single) == (2, 4, None)
    (job,) = composed([*overrides, "-m", "optimizer.lr=choice(0.1)"], monkeypatch)
    assert (chosen(job), job.swept) == ((2, 4, 0.1), ("optimizer.lr=0.1",))


@pytest.mark.parametrize("sweeper", [[], ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1"]])
def test_what_varies_goes_on_top_of_what_was_given_before(sweeper, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    overrides = ["optimizer.lr=1", "train={steps: 9, global_batch_size: 4}", "optimizer.lr=0.1,0.1", "train.steps=2,2"]
    jobs = composed(["-m", *sweeper, *overrides], monkeypatch)
    assert {chosen(job) for job in jobs} == {(2, 4, 0.1)}


def test_a_swept_group_and_a_key_of_its_section(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = composed(["-m", "model=tiny,gpt2", "model={num_layers: 3}", "model.family=llama"], monkeypatch)
    assert [job.settings["model"]["num_layers"] for job in jobs] == [3, 3]
    assert [job.settings["name"] for job in jobs] == ["tiny", "gpt2"]


@pytest.mark.parametrize(
    "argument",
    [
        'hydra.sweeper.params={train.steps: "5,6"}',
        '+hydra.sweeper.params={train.steps: "range(5,7)", optimizer.lr: 0.1}',
        '++hydra.sweeper.params.train.steps="choice(5,6)"',
        "hydra.sweeper.params.train.steps=5,6",
    ],
)
def test_a_sweep_in_hydras_own_key_on_the_command_line(argument, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = composed([argument, "-m"], monkeypatch)
    assert [chosen(job)[0] for job in jobs] == [5, 6]


def test_a_sweep_in_a_recipe_and_the_command_line(monkeypatch, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "night.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      train.steps: 5,6\n      optimizer.lr: 1,2\n"
    )
    monkeypatch.chdir(tmp_path)
    jobs = composed(
        ["recipe=night", "-m", f"--config-dir={tmp_path}", "optimizer={lr: 9}", "optimizer.lr=4"], monkeypatch
    )
    assert [chosen(job) for job in jobs] == [(5, 8, 4), (6, 8, 4)]


def test_hydra_knows_the_job_by_the_name_of_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (job,) = composed(["hydra/job_logging=default", "name=a_${hydra:job.name}"], monkeypatch)
    assert job.settings["name"] == "a_train"
    assert [path.name for path in tmp_path.iterdir()] == ["train.log"]


@pytest.mark.parametrize("override", ["experiment=one", "+experiment=one", "experiment=[one]"])
def test_an_experiment_of_the_users_own_goes_on_top_of_a_recipe(override, monkeypatch, tmp_path):
    for file, text in {
        "recipe/night.yaml": "defaults:\n  - override /precision: bf16\ntrain: {steps: 5, global_batch_size: 64}\n",
        "experiment/one.yaml": "train: {steps: 6}\noptimizer: {lr: 2}\n",
    }.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(f"# @package _global_\n{text}")
    (job,) = composed([override, "recipe=night", f"--config-dir={tmp_path}", "optimizer.lr=3"], monkeypatch)
    assert chosen(job) == (6, 64, 3)
    assert job.settings["precision"]["bf16"] is True
    assert "experiment" not in job.settings


@pytest.mark.parametrize("slot", ["experiment", "recipe"])
def test_an_experiment_without_its_first_line(slot, monkeypatch, capsys, tmp_path):
    (tmp_path / slot).mkdir()
    (tmp_path / slot / "one.yaml").write_text("train: {steps: 6}\n")
    code, _, err = run_in_process(driver.main, [f"{slot}=one", "--config-dir", str(tmp_path)], monkeypatch, capsys)
    assert code == 2
    assert err == f"{slot}: {slot}/one.yaml sets keys of '{slot}'; make its first line '# @package _global_'\n"
