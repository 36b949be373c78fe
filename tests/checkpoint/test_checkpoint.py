"""Training checkpoints: what lies where, their retention and their refusals."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.runs import config, train


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    run = config(tmp_path, checkpoint={"save_interval": 3, "keep_last": 2}, train={"eval_interval": None})
    run_distributed(train, 1, run)
    root = run.run_dir / "checkpoints"
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000018", "iter_0000020"]


def test_retention_never_counts_what_lies_after_the_newest(tmp_path: Path) -> None:
    from bridge.checkpoint import files

    for step in (1, 2, 3, 9):  # 9: its save was killed before `latest` moved, then the run went on from 2
        (tmp_path / f"iter_{step:07d}").mkdir()
    files.retain(tmp_path / "iter_0000003", keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000003", "iter_0000009"]


def test_weights_lie_at_the_top_level_under_canonical_names(tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    from bridge.weights import locate

    run = config(tmp_path, train={"steps": 4, "eval_interval": None})
    run_distributed(train, 1, run)
    found = locate.locate(run.run_dir)
    names = set(load_sharded_metadata(str(found.directory)))
    assert {"embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc1.weight"} <= names
    assert "optimizer.state.exp_avg.embedding.word_embeddings.weight" in names
    assert locate.read_model_section(found.root) == run.model


def executed_with_a_generator_as_an_object(run: Any) -> Any:
    from bridge.checkpoint import content
    from bridge.launch.worker import execute

    if os.environ["RANK"] == "1":
        content.random_state = lambda: {"cuda": Fraction(1, 2)}  # type: ignore[assignment, return-value]
    (run.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    return execute(run, rank=int(os.environ["RANK"]))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_no_resume_would_read_ends_the_run_at_its_first_save(tmp_path: Path, asynchronous: bool) -> None:
    run = config(tmp_path, checkpoint={"save_interval": 3, "async_save": asynchronous}, train={"eval_interval": None})
    for result in run_distributed(executed_with_a_generator_as_an_object, 2, run, timeout=60):
        assert (result.status, result.exit_code) == ("failed", 1)
        assert "holds fractions.Fraction, which is not a plain value" in result.error and "\n" not in result.error
        assert "iter_0000003: could not be saved" in result.error and "no earlier checkpoint" in result.error
    assert not list((run.run_dir / "checkpoints").glob("*iter_*"))


def train_reading(run: Any, identity: str) -> Any:
    from bridge.data.source import Prepared

    Prepared.identity = identity  # type: ignore[assignment, method-assign]
    return train(run)


def test_other_data_than_before_is_refused(tmp_path: Path) -> None:
    run_distributed(train_reading, 1, config(tmp_path, train={"exit_interval": 1, "eval_interval": None}), "text-1")
    with pytest.raises(
        AssertionError, match="data.source: the prepared data is text-2, but this run has read text-1 so far"
    ):
        run_distributed(train_reading, 1, config(tmp_path), "text-2")
