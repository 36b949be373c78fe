"""However often a run is stopped or killed, and whatever changes between, it reads every sample of an epoch once."""

import itertools
import os
import random
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.config.schema import Train
from bridge.data import sampler
from tests.distributed import run_distributed
from tests.training.runs import config, recorded, train

SAMPLES = 7  # not a multiple of any batch below: every epoch begins and ends inside a step
KEEP = {"log": {"sample_ids": True}, "data": {"num_samples": SAMPLES}}


def read_by_step(run_dir: Path) -> dict[int, list[int]]:
    """The ids of each step in the order of the data: a micro-batch of each data-parallel rank in turn."""
    by_rank: dict[int, list[list[list[int]]]] = defaultdict(list)
    for file in sorted((run_dir / "sample_ids").iterdir()):
        for step, lines in itertools.groupby(recorded(file), key=lambda line: line[0]):
            by_rank[step].append([ids for _, ids in lines])
    return {
        step: [index for turn in zip(*ranks, strict=True) for ids in turn for index in ids]
        for step, ranks in sorted(by_rank.items())
    }


def epochs(ids: list[int], size: int) -> list[list[int]]:
    return [sorted(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]


def train_and_die(run: Any, last: int) -> None:
    """Train; be killed as by the kernel in the step after `last` have been done, its samples read."""
    from bridge.training import loop

    original, calls = loop.train_step, itertools.count()

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    loop.train_step = dying
    train(run)


def test_killed_and_resumed_with_other_data_parallel_sizes(tmp_path: Path):
    def run(name: str = "moved", **limits: Any) -> Any:
        limits = {"steps": 12, "eval_interval": None, **limits}
        return config(tmp_path, name=name, train=limits, checkpoint={"save_interval": 2}, **KEEP)

    with pytest.raises(AssertionError, match="exit code -9"):
        run_distributed(train_and_die, 2, run(), 3, fresh=True)  # three steps are done, two of them saved
    moved = tmp_path / "moved"
    assert set(read_by_step(moved)) == {1, 2, 3, 4}
    run_distributed(train, 1, run(exit_interval=5))
    assert set(read_by_step(moved)) == {1, 2, 3, 4, 5}
    with pytest.raises(AssertionError, match="exit code -9"):
        run_distributed(train_and_die, 1, run(), 0, fresh=True)
    run_distributed(train, 2, run())
    run_distributed(train, 1, run("straight"))
    assert read_by_step(moved) == read_by_step(tmp_path / "straight")
    ids = list(itertools.chain.from_iterable(read_by_step(moved).values()))
    assert len(ids) == 48
    assert epochs(ids, SAMPLES) == [list(range(SAMPLES))] * 6


def test_resumed_with_other_batches(tmp_path: Path):
    """From ramp-up to a constant batch and another micro-batch, with two ranks that share each sequence in between."""

    def run(parallelism: dict[str, Any], **limits: Any) -> Any:
        return config(tmp_path, train={"steps": 11, "eval_interval": None, **limits}, parallelism=parallelism, **KEEP)

    run_distributed(train, 1, run({}, exit_interval=3, rampup_batch_size=[2, 2, 8], global_batch_size=6))
    run_distributed(train, 2, run({"context_parallel_size": 2}, exit_interval=5, global_batch_size=3))
    last = run_distributed(train, 2, run({}, global_batch_size=8, micro_batch_size=2))[0]
    steps = read_by_step(tmp_path / "run")
    assert [len(ids) for ids in steps.values()] == [2, 2, 4, 3, 3, *[8] * 6]
    ids = list(itertools.chain.from_iterable(steps.values()))
    assert [line["consumed_samples"] for line in last.lines if "loss" in line][-1] == len(ids)
    assert epochs(ids, SAMPLES) == [list(range(SAMPLES))] * (len(ids) // SAMPLES)


def segment(consumed: int, number: int, *, size: int, train: Train, num_ranks: int) -> list[int]:
    """What `number` steps after `consumed` samples read, in the order of the data, as the ranks' samplers say."""
    from bridge.training.batches import batch_size_at

    def reader(rank: int) -> Iterator[list[int]]:
        return iter(
            sampler.TrainingBatches(
                size=size,
                seed=train.seed,
                consumed=consumed,
                batch_size_at=batch_size_at(train, data_parallel_size=num_ranks),
                micro_batch_size=train.sequences_per_pass(num_ranks),
                rank=rank,
                num_ranks=num_ranks,
            )
        )

    size_at = batch_size_at(train, data_parallel_size=num_ranks)
    ranks = [reader(rank) for rank in range(num_ranks)]
    ids: list[int] = []
    for _ in range(number):
        samples, before = size_at(consumed + len(ids)), len(ids)
        while len(ids) - before < samples:
            ids += itertools.chain.from_iterable(next(rank) for rank in ranks)
    return ids


@pytest.mark.parametrize("case", range(20))
def test_any_sequence_of_resumes_reads_every_epoch_once(case: int):
    """Sizes of dataset, batch, micro-batch and data parallelism, ramp-up and places of interruption drawn at random."""
    draw = random.Random(case)
    size, seed = draw.randint(1, 60), draw.randint(0, 1000)
    ids: list[int] = []
    while len(ids) < 5 * size:
        num_ranks, micro_batch_size = draw.choice([1, 2, 3, 4]), draw.choice([1, 2, 3])
        stride = num_ranks * micro_batch_size
        ramp = [stride, stride, draw.randint(1, 100)] if draw.random() < 0.5 else None
        train = Train(
            global_batch_size=stride * draw.randint(2, 5),
            micro_batch_size=micro_batch_size,
            rampup_batch_size=ramp,
            seed=seed,
        )
        ids += segment(len(ids), draw.randint(1, 4), size=size, train=train, num_ranks=num_ranks)
    assert epochs(ids, size) == [list(range(size))] * (len(ids) // size)
    assert ids == sampler.sample_ids(0, len(ids), size=size, seed=seed)
