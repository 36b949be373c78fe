"""train.epochs: every sample so many times, the last batch not filled up; evaluations by epoch; the best one."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from bridge.config import run_config
from bridge.config.schema import Train
from bridge.errors import ConfigError
from tests.checkpoint.test_data_position import epochs, read_by_step
from tests.distributed import run_distributed
from tests.training.packed_source import LENGTHS
from tests.training.runs import config, losses, train, train_and_print

SAMPLES, EPOCHS, BATCH = 7, 3, 4  # 21 samples: five batches and one of a single sample
DATA = {"source": "tests.training.masked", "sequence_length": 16, "vocab_size": 100, "num_samples": SAMPLES}
CONSTANT = {"lr_decay_style": "constant", "lr_warmup_steps": 0}


def run(folder: Path, name: str, *, parallelism: dict[str, Any] | None = None, **limits: Any) -> Any:
    limits = {"steps": None, "epochs": EPOCHS, "global_batch_size": BATCH, "eval_interval": "epoch", **limits}
    return config(
        folder,
        name=name,
        data=DATA,
        train=limits,
        parallelism=parallelism or {},
        scheduler=CONSTANT,
        log={"sample_ids": True},
    )


def train_both(*runs: Any) -> list[Any]:
    """What each gave and printed, one after the other in this world."""
    return [train_and_print(one) for one in runs]


def test_every_sample_once_an_epoch_whatever_the_ranks(tmp_path: Path) -> None:
    """Stopped twice inside an epoch and resumed with other ranks; the last batch lies on one of two ranks alone."""
    whole = run(tmp_path, "run")
    by_steps = run(tmp_path, "steps", steps=5, epochs=None, eval_interval=None)
    one_more = run(tmp_path, "steps", steps=6, epochs=None, global_batch_size=1, eval_interval=None)
    (straight, said), _, (single, _) = run_distributed(train_both, 1, whole, by_steps, one_more)[0]
    run_distributed(train, 2, run(tmp_path, "moved", exit_interval=2, micro_batch_size=2))
    run_distributed(train, 2, run(tmp_path, "moved", exit_interval=4, parallelism={"context_parallel_size": 2}))
    moved, resumed = run_distributed(train_and_print, 2, run(tmp_path, "moved"))[0]

    line = "train.epochs: 3 x 7 samples are 6 steps, the last one with 1 of 4 samples"
    assert line in said and line in resumed
    assert (straight.status, straight.step) == (moved.status, moved.step) == ("done", 6)
    for name in ("run", "moved"):
        steps = read_by_step(tmp_path / name)
        assert [len(ids) for ids in steps.values()] == [4, 4, 4, 4, 4, 1]
        ids = list(itertools.chain.from_iterable(steps.values()))
        assert epochs(ids, SAMPLES) == [list(range(SAMPLES))] * EPOCHS
    assert losses(moved.lines) == pytest.approx(losses(straight.lines), rel=1e-5)
    # The last step is that of a whole batch of one sample.
    last, alone = (
        next(line for line in lines if line["step"] == 6 and "loss" in line) for lines in (straight.lines, single.lines)
    )
    for number in ("loss", "grad_norm", "consumed_samples"):
        assert last[number] == pytest.approx(alone[number], rel=1e-5), number
    for lines in (straight.lines, moved.lines):
        counts = lines[-2]["consumed_samples"], lines[-2]["consumed_tokens"], lines[-2]["epoch"]
        assert counts == (EPOCHS * SAMPLES, EPOCHS * SAMPLES * 16, EPOCHS)
        assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]  # of 7, 14 and 21 samples


def test_the_best_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    """A model that learns random samples by heart, stopped and resumed in between, and not; expected by its lines."""

    def run(name: str, **limits: Any) -> Any:
        limits = {"steps": 60, "eval_interval": 2, "patience": 3, **limits}
        checkpoint = {"keep_best": "eval_loss", "keep_last": 1}
        data = {"num_samples": 100, "vocab_size": 30}
        return config(tmp_path, name=name, train=limits, checkpoint=checkpoint, scheduler=CONSTANT, data=data)

    (whole, said), _, (resumed, _) = run_distributed(
        train_both, 1, run("run"), run("cut", exit_interval=7), run("cut")
    )[0]
    values = {line["step"]: line["eval_loss"] for line in whole.lines if "eval_loss" in line}
    best = min(values, key=values.__getitem__)
    last = max(values)
    assert last == best + 6 and 7 < last < 60
    assert (whole.status, whole.step, whole.eval_loss) == ("done", last, values[last])
    assert said.splitlines()[-2] == (
        f"train.patience: 3 evaluations without a lower eval_loss than the {values[best]:.4f} of step {best}; the run "
        f"ends with step {last}"
    )
    assert [line.get("eval_loss") for line in resumed.lines] == [line.get("eval_loss") for line in whole.lines]
    for name in ("run", "cut"):
        root = tmp_path / name / "checkpoints"
        assert os.readlink(root / "best") == f"iter_{best:07d}"
        assert sorted(path.name for path in root.glob("iter_*")) == [f"iter_{best:07d}", f"iter_{last:07d}"]

    from bridge.launch.evaluation import subject
    from bridge.runs import claim
    from bridge.runs.result import Result, write_result
    from bridge.weights import locate

    found = locate.locate(root / "best")
    assert (found.root, found.iteration) == (root, best) and locate.is_megatron(root / "best")
    assert subject(run("cut"), run_dir=tmp_path / "cut").init.path == str(tmp_path / "cut")
    run_config.write(run("cut"), tmp_path / "cut" / "config.yaml")  # which the driver and its worker write
    write_result(Result("done", last, values[last]), tmp_path / "cut")
    assert claim.finished(run("cut")) == Result("done", last, values[last])
    assert claim.finished(run("cut", patience=4)) is None


def test_what_is_best() -> None:
    from bridge.checkpoint import Position
    from bridge.training.best import Best

    def best(metric: str | None, progress: Position, **options: Any) -> Best:
        checkpoint = {"keep_best": metric, **options}
        return Best(config(Path("runs"), checkpoint=checkpoint, train={"patience": 2}), progress)

    judged = best("eval_right", Position(), best_is="highest")
    values = [0.1, float("nan"), 0.4, 0.4, 0.2]
    assert [judged.judge(step, {"eval_right": value}) for step, value in enumerate(values, 1)] == [
        *(True, False, True, False, False)
    ]
    said = (
        "train.patience: 2 evaluations without a higher eval_right than the 0.4000 of step 3; the run ends with step 5"
    )
    assert judged.ending(5) == said
    remembered = judged.remembered(Position(step=5))
    assert best("eval_right", remembered, best_is="highest").ending(5) == said
    assert best(None, remembered).ending(5) is None  # of another metric nothing is known


@pytest.mark.parametrize(
    ("checkpoint", "patience", "metrics", "message"),
    [
        (
            {"keep_best": "eval_los"},
            None,
            ["eval_loss", "eval_loss/news"],
            "checkpoint.keep_best: 'eval_los' is not among",
        ),
        (
            {"keep_best": "eval_loss"},
            None,
            [],
            "checkpoint.keep_best: eval_loss goes by evaluations, but the data holds",
        ),
        ({}, 3, [], "train.patience: 3 goes by evaluations, but the data holds nothing out"),
    ],
)
def test_nothing_to_judge_by(checkpoint: dict[str, str], patience: Any, metrics: list[str], message: str) -> None:
    from bridge.training import best

    with pytest.raises(ConfigError, match=f"^{message}"):
        best.check(config(Path("runs"), checkpoint=checkpoint, train={"patience": patience}), metrics)


@pytest.mark.parametrize("ramp", [None, [2, 2, 9], [2, 1, 30]])
@pytest.mark.parametrize("consumed", [0, 5])
def test_the_steps_are_those_of_a_count(ramp: list[int] | None, consumed: int) -> None:
    """Against reading batch by batch; a run that has read more than that is refused."""
    from bridge.checkpoint import Position
    from bridge.training import length

    def size_at(consumed: int) -> int:
        return 6 if ramp is None or consumed > ramp[2] else min(6, ramp[0] + ramp[1] * (consumed // 7))

    setting = Train(epochs=4, global_batch_size=6, rampup_batch_size=ramp)
    found = length.of(
        setting, num_samples=11, batch_size_at=size_at, progress=Position(step=3, consumed_samples=consumed)
    )
    step, read = 3, consumed
    while read < 44:
        counted = min(size_at(read), 44 - read)
        assert found.counted(read, size_at(read)) == counted
        last = (counted, size_at(read))
        step, read = step + 1, read + counted
    assert (found.steps, found.samples, found.last) == (step, 44, last)
    with pytest.raises(ConfigError, match="^train.epochs: 4 x 11 samples, but this run has already read 45; set more"):
        length.of(setting, num_samples=11, batch_size_at=size_at, progress=Position(consumed_samples=45))


def train_and_look(run: Any) -> Any:
    """What the run gave and printed, and the samples of each of its rows."""
    from bridge.training import setup

    ran = train_and_print(run)
    packed = setup.prepare_data(run).build(seed=run.train.seed).train
    return ran, [packed.of_row(row).tolist() for row in range(len(packed))]


def test_every_sample_once_where_samples_share_rows(tmp_path: Path) -> None:
    """Stopped on one rank inside an epoch, ended on two. Samples of L tokens have L - 1 that predict. Context-parallel
    ranks would have other rows."""

    def run(parallelism: dict[str, Any] | None = None, **limits: Any) -> Any:
        data = {"source": "tests.training.packed_source", "sequence_length": 16, "vocab_size": 100}
        return config(
            tmp_path,
            data=data | {"cache_dir": str(tmp_path / "cache")},
            parallelism=parallelism or {},
            train={"steps": None, "epochs": EPOCHS, "global_batch_size": BATCH, "eval_interval": None, **limits},
            scheduler=CONSTANT,
            log={"sample_ids": True},
        )

    run_distributed(train, 1, run(exit_interval=4))
    with pytest.raises(AssertionError, match="data.source: the prepared data is .*, but this run has read .* so far"):
        run_distributed(train, 2, run(micro_batch_size=2, parallelism={"context_parallel_size": 2}))
    (ended, said), samples = run_distributed(train_and_look, 2, run(micro_batch_size=2))[0]
    num_rows = len(samples)
    steps, left = divmod(EPOCHS * num_rows, BATCH)
    assert left  # so that the last batch is not whole
    assert f"{num_rows} samples are {steps + 1} steps, the last one with {left} of {BATCH} samples" in said
    rows = list(itertools.chain.from_iterable(read_by_step(tmp_path / "run").values()))
    read = [sample for row in rows for sample in samples[row]]
    assert epochs(read, len(LENGTHS)) == [list(range(len(LENGTHS)))] * EPOCHS
    last = [line for line in ended.lines if "loss" in line][-1]
    assert (last["step"], last["consumed_samples"]) == (steps + 1, EPOCHS * num_rows)
    assert last["consumed_tokens"] == EPOCHS * sum(length - 1 for length in LENGTHS)
