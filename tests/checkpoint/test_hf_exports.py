"""checkpoint.save_hf: an export beside each checkpoint, by another process, equal to what convert.py writes."""

from pathlib import Path
from typing import Any

from tests.checkpoint.test_damage import executed, export
from tests.distributed import run_distributed
from tests.training.runs import config

SAVING = {"save_interval": 3, "save_hf": True, "keep_last": 1}
STEPS: dict[str, Any] = {"train": {"steps": 6, "eval_interval": None}}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_export_is_what_convert_writes_and_goes_with_its_checkpoint(tmp_path: Path) -> None:
    run = config(tmp_path, checkpoint={**SAVING, "async_save": True}, **STEPS)
    assert run_distributed(executed, 1, run)[0].status == "done"
    assert run_distributed(export, 1, run.run_dir, tmp_path / "hf")[0] == ""
    exports = run.run_dir / "hf"
    assert [path.name for path in exports.iterdir()] == ["iter_0000006"]
    assert [path.name for path in (run.run_dir / "checkpoints").glob("iter_*")] == ["iter_0000006"]
    assert contents(exports / "iter_0000006") == contents(tmp_path / "hf")
    assert "model.safetensors" in contents(tmp_path / "hf")


def test_an_export_that_fails_is_told_and_costs_no_checkpoint(tmp_path: Path) -> None:
    run = config(tmp_path, checkpoint=SAVING, **STEPS)
    run.run_dir.mkdir()
    (run.run_dir / "hf").touch()  # in the way
    result = run_distributed(executed, 1, run)[0]
    assert (result.status, result.exit_code) == ("failed", 1)
    assert result.error.startswith(f"checkpoint.save_hf: {run.run_dir / 'hf' / 'iter_0000006'} was not written (")
    assert "File exists" in result.error and "\n" not in result.error
    assert (run.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "6"

    (run.run_dir / "hf").unlink()
    assert run_distributed(executed, 1, run)[0].status == "done"
    assert (run.run_dir / "hf" / "iter_0000006" / "model.safetensors").is_file()
