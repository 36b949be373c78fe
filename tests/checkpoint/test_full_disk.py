"""A disk that fills up or turns read-only, for real: a small tmpfs, which takes root."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ConfigError
from bridge.runs.claim import claimed
from bridge.weights import pointer
from tests.checkpoint.test_damage import executed
from tests.distributed import run_distributed
from tests.training.runs import config

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
STEPS: dict[str, Any] = {"train": {"steps": 12, "eval_interval": None}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1.2 MB: two checkpoints of 0.45 MB and half a third."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no mounts here: {mounted.stderr.decode()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_disk_costs_one_checkpoint(disk: Path, asynchronous: bool) -> None:
    run = config(disk, checkpoint={"save_interval": 3, "async_save": asynchronous}, **STEPS)
    result = run_distributed(executed, 1, run)[0]
    root = run.run_dir / "checkpoints"
    assert (result.status, result.exit_code) == ("failed", 1)
    not_saved = f"{root / 'iter_0000009'}: could not be saved (No space left on device); iter_0000006 stays the latest"
    not_reported = f"{run.run_dir}: a report cannot be written (No space left on device)"
    # While the disk is full of half a checkpoint written in the background, a report may be the first to find out.
    assert result.error in ([f"{not_saved} checkpoint"] + [not_reported] * asynchronous)
    left = sorted(path.name for path in root.iterdir() if not (asynchronous and path.name.startswith(".saving_")))
    assert left == ["hf", "iter_0000003", "iter_0000006", "latest_checkpointed_iteration.txt", "model.yaml"]
    remount(disk, "size=4m")
    assert run_distributed(executed, 1, run)[0].status == "done"


def test_a_read_only_disk_is_one_line(disk: Path) -> None:
    remount(disk, "ro")
    run = config(disk)
    refused = f"runs_dir: {run.run_dir}.* cannot be written \\(Read-only file system\\)"
    with pytest.raises(ConfigError, match=refused), claimed(run, overrides=[]):
        pass
    remount(disk, "rw")
    result = run_distributed(train_until_read_only, 1, config(disk, checkpoint={"save_interval": 3}, **STEPS))[0]
    assert (result.status, result.exit_code) == ("failed", 1)
    assert result.error.endswith(": Read-only file system); iter_0000003 stays the latest checkpoint")


def train_until_read_only(run: Any) -> Any:
    """At the second save nothing more can be written below checkpoints/."""
    from bridge.checkpoint import files

    original = files.remove_leftovers

    def after(root: Path) -> None:
        original(root)
        if pointer.read(root) is not None:
            subprocess.run(["mount", "--bind", str(root), str(root)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(root)], check=True)

    files.remove_leftovers = after
    try:
        return executed(run)
    finally:
        subprocess.run(["umount", "-l", str(run.run_dir / "checkpoints")], check=True)
