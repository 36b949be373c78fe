"""What is refused, and which run is answered for, before torch is imported and a run directory claimed."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bridge.config.schema import Checkpoint, Init, Launch, Log, Train, Wandb
from bridge.errors import ConfigError
from bridge.launch import inputs
from bridge.platform import devices
from bridge.runs import result, run_files
from bridge.runs.claim import claimed, finished
from bridge.runs.result import Result
from tests.training import runs


def changed(config: Any, **sections: Any) -> Any:
    return dataclasses.replace(config, **sections)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere does not exist; give a Hugging Face directory or a Megatron checkpoint"),
        ("file", "file is a file; give"),
        ("empty", r"empty is neither a Hugging Face directory \(config.json\) nor a Megatron checkpoint"),
        ("cut", "cut/iter_0000005 is not a directory|cut/iter_0000005 is not a complete torch_dist checkpoint"),
    ],
)
def test_where_weights_cannot_come_from(tmp_path: Path, path: str, message: str):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut" / "iter_0000005").mkdir(parents=True)
    (tmp_path / "cut" / "latest_checkpointed_iteration.txt").write_text("5")
    config = changed(runs.config(tmp_path), init=Init(path=str(tmp_path / path)))
    with pytest.raises(ConfigError, match=f"^init.path: .*{message}"):
        inputs.check(config)
    inputs.check(changed(config, launch=Launch(check_paths=False)), in_queue=True)
    latest = config.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    latest.parent.mkdir(parents=True)
    latest.write_text("1")
    inputs.check(config)  # a resumed run does not read init.path


@pytest.mark.parametrize(
    ("key", "path", "message"),
    [
        ("tokenizer", "nowhere", "nowhere does not exist; name a Hugging Face tokenizer directory"),
        ("tokenizer", "file", "file is a file"),
        ("tokenizer", "empty", "empty has no tokenizer.json"),
        ("cache_dir", "file/cache", "file is a file; set a directory you can write to"),
    ],
)
def test_data_paths(tmp_path: Path, key: str, path: str, message: str):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    config = runs.config(tmp_path)
    data = {"source": "stdlib", "sequence_length": 8, key: str(tmp_path / path)}
    with pytest.raises(ConfigError, match=f"^data.{key}: .*{message}"):
        inputs.check(changed(config, data=data))


def test_a_source_of_the_users_own_may_check_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def check(options: Any) -> None:
        raise ConfigError(f"data.num_samples: {options.num_samples} files are missing")

    module = ModuleType("corpora.mine")
    module.__dict__.update(vars(import_module("bridge.data.mock")), check=check)
    config = changed(runs.config(tmp_path), data={"source": "corpora.mine", "num_samples": 3})
    monkeypatch.setattr(inputs.modules, "load", lambda *_: module)
    with pytest.raises(ConfigError, match="^data.num_samples: 3 files are missing"):
        inputs.check(config)


@pytest.mark.parametrize(
    ("log", "package", "message"),
    [
        (Log(wandb=Wandb(project="p")), "wandb", "log.wandb.project: p needs a package .*pip install wandb"),
        (Log(tensorboard=True), "tensorboard", "log.tensorboard: true needs .*pip install tensorboard"),
    ],
)
def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log, package: str, message: str):
    config = changed(runs.config(tmp_path), log=log)
    inputs.check(config)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=message):
        inputs.check(config)


def test_a_setting_for_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = runs.config(tmp_path)
    config = changed(config, precision={**config.precision, "cuda_graph_impl": "local"})
    monkeypatch.setattr(devices, "DRIVERS", ())
    with pytest.raises(ConfigError, match="^precision.cuda_graph_impl: local needs CUDA"):
        inputs.check(config)
    inputs.check(config, in_queue=True)
    monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path),))
    inputs.check(config)  # whether that GPU will do is for the workers to say


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["init.path=qwen3", "data=chat", "data.path=none.jsonl", "data.sequence_length=32"],
            "data.path: {0}/none.jsonl does not exist",
        ),
        (["init.path=qwen3", "model=tiny", "data.sequence_length=4096"], "model.num_layers is 6 (there "),
        (["data=chat", "data.path=none.jsonl"], "init.path: is not set, and data.source=chat is for fine-tuning; "),
    ],
)
def test_refusals_import_no_torch(tmp_path: Path, tiny_hf: Callable[..., Path], words: list[str], message: str):
    """Weights come before sizes, which are not the user's where the model is none of theirs."""
    tiny_hf("qwen3").rename(tmp_path / "qwen3")
    command = (
        "import atexit, sys; from bridge.launch.driver import main; "
        "atexit.register(lambda: print('heavy:', {'torch', 'transformers'} & set(sys.modules))); main()"
    )
    done = subprocess.run([sys.executable, "-c", command, *words], cwd=tmp_path, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and message.format(tmp_path) in line
    assert "heavy: set()" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_finished_run(tmp_path: Path):
    config = runs.config(tmp_path)
    steps = config.train.steps
    done = Result("done", step=steps, eval_loss=2.5)
    assert finished(config) is None
    with claimed(config, overrides=[]) as claim:
        latest = claim.path / "checkpoints" / "latest_checkpointed_iteration.txt"
        directory = latest.parent / f"iter_{steps:07d}"
        directory.mkdir(parents=True)
        latest.write_text(str(steps))
        (directory / ".metadata").touch()
        (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        assert finished(config) is None
    for status in ("stopped", "failed"):
        result.write_result(dataclasses.replace(done, status=status), config.run_dir)
        assert finished(config) is None
    result.write_result(done, config.run_dir)
    assert finished(config) == done
    assert finished(changed(config, train=dataclasses.replace(config.train, steps=steps + 1))) is None
    assert finished(changed(config, train=dataclasses.replace(config.train, seed=5))) is None
    assert finished(changed(config, checkpoint=Checkpoint(save_hf=True))) is None
    assert finished(changed(config, train=Train(steps=steps))) is None
    (directory / ".metadata").unlink()
    assert finished(config) is None
    (config.run_dir / run_files.RESULT).write_text("{")
    assert finished(config) is None
