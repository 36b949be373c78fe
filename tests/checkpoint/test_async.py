"""Saves in the background: what they hold, when they count, and what becomes of one that fails."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.runs import config, train

SHARDED = {"use_distributed_optimizer": True}
QUICK: dict[str, Any] = {"train": {"steps": 8, "eval_interval": None}}


def train_with_slow_writers(run: Any) -> Any:
    """Tensors are copied when the next update is due, and written when the weights of the trainer are others."""
    from bridge.checkpoint import writers

    def late(original: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.3)
            return original(*arguments, **options)

        return wrapped

    writers.copy_tensors, writers.write_file = late(writers.copy_tensors), late(writers.write_file)
    return train(run)


@pytest.mark.parametrize(("world_size", "parallelism"), [(1, {}), (2, SHARDED)], ids=["one", "dp2_sharded"])
def test_what_was_written_in_the_background_is_what_was_there(
    tmp_path: Path, world_size: int, parallelism: dict[str, Any]
) -> None:
    saving = {"save_interval": 4, "keep_last": None}
    at_once = config(tmp_path, name="at_once", parallelism=parallelism, checkpoint=saving, **QUICK)
    behind = config(tmp_path, name="b", parallelism=parallelism, checkpoint={**saving, "async_save": True}, **QUICK)
    run_distributed(train, world_size, at_once)
    run_distributed(train_with_slow_writers, world_size, behind)

    lines = (behind.run_dir / "metrics.jsonl").read_text().splitlines()
    (first, last) = [line for line in map(json.loads, lines) if "saved_step" in line]
    assert first["step"] > first["saved_step"] == 4 and first["save_stall_seconds"] > 0, "the trainer waited"
    assert last["saved_step"] == last["step"] == 8
    for iteration in ("iter_0000004", "iter_0000008"):
        one, other = (run.run_dir / "checkpoints" / iteration for run in (at_once, behind))
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in other.iterdir())
        for name in names:
            if name.endswith((".distcp", ".pt")):  # the others hold their own path
                assert (one / name).read_bytes() == (other / name).read_bytes(), f"{iteration}/{name}"


def executed(run: Any, fault: str) -> Any:
    """The result of a run whose second save meets with `fault`, as worker.execute reports it."""
    from bridge.checkpoint import files, writers, writing
    from bridge.launch.worker import execute

    def second(original: Any, *, rank: int, act: Any) -> Any:
        calls = 0

        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2 and os.environ["RANK"] == str(rank):
                act()
            return original(*arguments, **options)

        return wrapped

    def full() -> None:
        raise OSError(28, "No space left on device")

    if "writer" in fault:
        # Who opens a pipe to write to it waits for a reader, which here never comes.
        obstruct = os.mkfifo if "stuck" in fault else os.mkdir
        file = run.run_dir / "checkpoints" / ".saving_iter_0000006" / "__1_0.distcp"
        writers.Writers.start = second(writers.Writers.start, rank=1, act=lambda: obstruct(file))
        writers.GRACE = 0.5
    elif fault == "common.pt":
        writing.TorchCommonSaveStrategy.save_common = second(
            writing.TorchCommonSaveStrategy.save_common, rank=0, act=full
        )
    elif fault == ".metadata":
        writers.FileSystemWriterAsync.finish = second(writers.FileSystemWriterAsync.finish, rank=0, act=full)
    elif fault == "metadata.json":
        writing.save_config = second(writing.save_config, rank=0, act=full)
    elif fault == "rename":
        files.publish = second(files.publish, rank=0, act=full)
    (run.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    return execute(run, rank=int(os.environ["RANK"]))


SAVING: dict[str, Any] = {"save_interval": 3, "write_timeout": "1s"}
FAULTS = {
    "failing_writer": (True, "Is a directory"),
    "stuck_writer": (True, "a writer made no progress within checkpoint.write_timeout=1s"),
    "stuck_writer_at_once": (False, "a writer made no progress within checkpoint.write_timeout=1s"),
    "common.pt": (True, "No space left on device"),
    ".metadata": (False, "No space left on device"),
    "metadata.json": (True, "No space left on device"),
    "rename": (False, "No space left on device"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_save_ends_all_ranks_and_harms_nothing(tmp_path: Path, fault: str) -> None:
    asynchronous, why = FAULTS[fault]
    run = config(tmp_path, checkpoint={**SAVING, "async_save": asynchronous}, **QUICK)
    results = run_distributed(executed, 2, run, fault, timeout=60)  # gloo itself would wait for 30 minutes
    root = run.run_dir / "checkpoints"
    for result in results:
        assert (result.status, result.exit_code) == ("failed", 1)
        assert str(root / "iter_0000006") in result.error and why in result.error
        assert "iter_0000003 stays the latest checkpoint" in result.error and "\n" not in result.error
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["hf", "iter_0000003"]
    assert run_distributed(train, 1, run)[0].status == "done"
