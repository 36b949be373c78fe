"""Checkpoints with damaged or malicious files: one line names the file, and nothing else happens."""

import dataclasses
import io
import os
import pickle
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.checkpoint import checksums
from bridge.config.schema import Init
from tests.distributed import run_distributed
from tests.training.runs import config, train

STEPS: dict[str, Any] = {"train": {"steps": 8, "eval_interval": None}, "checkpoint": {"save_interval": 3}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory with a run that saved at steps 3, 6 and 8."""
    runs_dir = tmp_path_factory.mktemp("finished")
    run_distributed(train, 1, config(runs_dir, **STEPS))
    return runs_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def iteration(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "iter_0000008"


def largest(directory: Path) -> Path:
    return max(directory.glob("*.distcp"), key=lambda file: file.stat().st_size)


def truncate(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def executed(run: Any) -> Any:
    from bridge.launch.worker import execute

    (run.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    return execute(run, rank=int(os.environ["RANK"]))


def verified(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and lines of `python -m bridge.checkpoint verify PATH`."""
    from bridge.checkpoint.__main__ import main

    code = main(["verify", str(path)])
    return code, capsys.readouterr().out.splitlines()


def test_verify_by_its_command_line(run_dir: Path) -> None:
    command = [sys.executable, "-m", "bridge.checkpoint", "verify"]
    done = subprocess.run([*command, str(run_dir)], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert [line.split(":")[0][-7:] for line in done.stdout.splitlines()] == ["0000003", "0000006", "0000008"]


@pytest.mark.parametrize("level", ["", "checkpoints", "checkpoints/iter_0000008"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_verify_names_the_damaged_file(
    run_dir: Path, iteration: Path, damage: Callable[[Path], None], level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = largest(iteration)
    damage(file)
    code, lines = verified(run_dir / level, capsys)
    assert code == 1 and [line for line in lines if line.startswith(f"{file}: ")] == lines[-1:]
    assert len(lines) == (1 if level.endswith("8") else 3)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "checksums.json"])
def test_verify_sees_every_file(iteration: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flip(iteration / name)
    code, lines = verified(iteration, capsys)
    assert code == 1 and str(iteration) in lines[0] and len(lines) == 1


def test_verify_without_checksums_reads_every_tensor(iteration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (iteration / "checksums.json").unlink()
    assert verified(iteration, capsys)[0] == 0
    file = largest(iteration)
    truncate(file)
    code, lines = verified(iteration, capsys)
    assert code == 1 and lines[0].startswith(f"{file}: ") and len(lines) == 1


def test_verify_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bridge.checkpoint.__main__ import main

    assert main(["verify", str(tmp_path)]) == 2
    assert main(["verify"]) == 2
    assert str(tmp_path) in capsys.readouterr().err.splitlines()[0]


def test_a_run_says_what_is_damaged_and_falls_back_when_told_to(run_dir: Path, iteration: Path) -> None:
    file = largest(iteration)
    truncate(file)
    flip(largest(run_dir / "checkpoints" / "iter_0000006"))
    longer = {**STEPS, "train": {**STEPS["train"], "steps": 10}}
    longer["scheduler"] = {"lr_decay_steps": 8}
    result = run_distributed(executed, 1, config(run_dir.parent, **longer))[0]
    assert (result.status, result.exit_code) == ("invalid", 2)
    assert f"{file}: " in result.error and "\n" not in result.error
    assert "checkpoint.fall_back=true resumes from iter_0000006 instead" in result.error

    longer["checkpoint"] = {"save_interval": 3, "fall_back": True, "verify": True}
    result, output = run_distributed(executed_with_output, 1, config(run_dir.parent, **longer))[0]
    said = [line for line in output.splitlines() if line.startswith(("checkpoint.fall_back", "resumed"))]
    assert result.status == "done" and len(said) == 3
    assert f"{file}: " in said[0] and said[0].endswith("falling back to iter_0000006")
    assert "CRC-32" in said[1] and said[1].endswith("falling back to iter_0000003")
    assert said[2].startswith("resumed from") and said[2].endswith("iter_0000003 at step 3")
    again = run_dir / "checkpoints" / "iter_0000006"
    assert not checksums.content_faults(again, checksums.read(again)), "step 6 was saved anew"


def executed_with_output(run: Any) -> Any:
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        return executed(run), sys.stdout.getvalue()
    finally:
        sys.stdout = stdout


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def rewrite_checksums(directory: Path) -> None:
    """As an attacker would."""
    names = checksums.read(directory)
    checksums.write(directory, {name: checksums.of_file(directory / name) for name in names})


def into_metadata(directory: Path, trace: Path) -> str:
    (directory / ".metadata").write_bytes(pickle.dumps(Payload(trace)))
    return ".metadata"


def into_common(directory: Path, trace: Path) -> str:
    content = torch.load(directory / "common.pt", weights_only=True)
    torch.save({**content, "args": Payload(trace)}, directory / "common.pt")
    return "common.pt"


def into_object(directory: Path, trace: Path) -> str:
    return replace_object(directory, "random_state", [Payload(trace)])


def into_extra_state(directory: Path, trace: Path) -> str:
    """Transformer Engine unpickles the bytes in such a tensor."""
    nested = torch.frombuffer(bytearray(pickle.dumps(Payload(trace))), dtype=torch.uint8)
    return replace_object(directory, "_extra_state", [nested])


def into_storage(directory: Path, trace: Path) -> str:
    """A tensor's pickle within that names a function of torch which loads without restriction."""

    class Storage:
        def __reduce__(self) -> Any:
            stream = io.BytesIO()
            torch.save(Payload(trace), stream)
            return torch.storage._load_from_bytes, (stream.getvalue(),)

    nested = torch.frombuffer(bytearray(pickle.dumps({"scale": Storage()})), dtype=torch.uint8)
    return replace_object(directory, "_extra_state", [nested])


def replace_object(directory: Path, key: str, value: Any) -> str:
    """Append `value` to its data file and point the index at it."""
    from bridge.weights.dist_files import _read_metadata

    metadata = _read_metadata(directory / ".metadata")
    storage = next(where for index, where in metadata.storage_data.items() if key in index.fqn)
    stream = io.BytesIO()
    torch.save(value, stream)
    file = directory / storage.relative_path
    storage.offset, storage.length = file.stat().st_size, len(stream.getvalue())
    file.write_bytes(file.read_bytes() + stream.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return storage.relative_path


MALICIOUS = [into_metadata, into_common, into_object, into_extra_state, into_storage]


@pytest.mark.parametrize("attack", MALICIOUS)
def test_a_checkpoint_cannot_run_code(
    iteration: Path, attack: Callable[[Path, Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bridge.checkpoint import resuming

    trace = tmp_path / "code_has_run"
    file = iteration / attack(iteration, trace)
    rewrite_checksums(iteration)
    with pytest.raises(Exception, match=str(file)) as caught:
        resuming._check(iteration, verify=True)
    assert "could run code" in str(caught.value) and "\n" not in str(caught.value)
    code, lines = verified(iteration, capsys)
    assert code == 1 and lines == [str(caught.value)]
    assert not trace.exists()


def test_what_transformer_engine_leaves_is_let_through(iteration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8's extra state: recipe, scales, plain values; the module is not needed, nor imported, to look at it."""
    from bridge.weights.plain_objects import check_plain

    recipe = types.ModuleType("transformer_engine.common.recipe")
    recipe.DelayedScaling = type("DelayedScaling", (), {"__module__": recipe.__name__})  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.common", recipe.__name__):
        monkeypatch.setitem(sys.modules, name, recipe)
    state = {
        "recipe": recipe.DelayedScaling(),  # type: ignore[attr-defined]
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(16, 3, dtype=torch.bfloat16),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_max_fwd": 448.0, "split": (1, [2])},
    }
    content = pickle.dumps(state)
    monkeypatch.undo()
    replace_object(iteration, "_extra_state", [torch.frombuffer(bytearray(content), dtype=torch.uint8)])
    check_plain(iteration)


def test_the_payloads_above_would_run(iteration: Path, tmp_path: Path) -> None:
    for number, attack in enumerate((into_metadata, into_common, into_object)):
        trace, copy = tmp_path / f"ran_{number}", tmp_path / f"copy_{number}"
        shutil.copytree(iteration, copy)
        file = copy / attack(copy, trace)
        if attack is into_metadata:
            pickle.loads(file.read_bytes())
        elif attack is into_common:
            torch.load(file, weights_only=False)
        else:
            length = len(file.read_bytes()) - (iteration / file.name).stat().st_size
            torch.load(io.BytesIO(file.read_bytes()[-length:]), weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("attack", [into_metadata, into_common])
def test_neither_a_run_nor_a_conversion_runs_it(
    run_dir: Path, iteration: Path, attack: Callable[[Path, Path], str], tmp_path: Path
) -> None:
    """Resuming, starting from its weights (which needs no common.pt), exporting."""
    trace = tmp_path / "code_has_run"
    file = attack(iteration, trace)
    rewrite_checksums(iteration)
    longer = {**STEPS, "train": {**STEPS["train"], "steps": 10}}
    run = config(run_dir.parent, **longer)
    resumed = run_distributed(executed, 1, run)[0]
    fresh = dataclasses.replace(run, name="fresh", init=Init(path=str(run_dir)))
    started = run_distributed(executed, 1, fresh)[0]
    exported = run_distributed(export, 1, run_dir, tmp_path / "hf")[0]
    assert (resumed.status, resumed.exit_code) == ("invalid", 2) and str(iteration / file) in resumed.error
    if attack is into_metadata:
        assert (started.status, started.exit_code) == ("invalid", 2)
        for error in (resumed.error, started.error, exported):
            assert str(iteration / file) in error and "could run code" in error and "\n" not in error
    else:
        assert started.status == "done" and exported == ""
    assert not trace.exists()


def export(run_dir: Path, target: Path) -> str:
    from bridge import convert
    from bridge.config.schema import ConvertConfig
    from bridge.errors import BridgeError

    del os.environ["RANK"]
    try:
        convert.run(ConvertConfig("export", hf=str(target), megatron=str(run_dir)))
    except BridgeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/model.yaml"])
def test_yaml_cannot_make_objects(run_dir: Path, name: str, tmp_path: Path) -> None:
    from bridge.config import run_config
    from bridge.errors import ConfigError
    from bridge.weights.locate import read_model_section

    trace = tmp_path / "code_has_run"
    (run_dir / name).write_text(f"model: !!python/object/apply:os.mkdir ['{trace}']\n")
    with pytest.raises(ConfigError, match=str(run_dir / name)) as caught:
        run_config.read(run_dir / name) if name == "config.yaml" else read_model_section(run_dir / "checkpoints")
    assert "\n" not in str(caught.value) and not trace.exists()
