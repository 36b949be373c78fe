"""The training and evaluation batches of this rank."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.core.num_microbatches_calculator import (
    ConstantNumMicroBatchesCalculator,
    NumMicroBatchesCalculator,
    RampupBatchsizeNumMicroBatchesCalculator,
)

from bridge import parallel, platform
from bridge.checkpoint import Position
from bridge.config.schema import Train
from bridge.data import loader, sampler
from bridge.data.batch import Batch


def batch_size_at(train: Train, *, data_parallel_size: int) -> Callable[[int], int]:
    """From the samples consumed so far to the global batch size of the next step, with megatron-core's ramp-up."""
    calculator = _calculator(train, data_parallel_size)

    def at(consumed: int) -> int:
        calculator.update(consumed, consistency_check=True)
        return calculator.get_current_running_global_batch_size()

    return at


def _calculator(train: Train, data_parallel_size: int) -> NumMicroBatchesCalculator:
    common = {
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.sequences_per_pass(data_parallel_size),
        "data_parallel_size": data_parallel_size,
        "decrease_batch_size_if_needed": False,
        "rank": parallel.rank(),
    }
    if train.rampup_batch_size is None:
        return ConstantNumMicroBatchesCalculator(**common)
    start, increment, samples = train.rampup_batch_size
    return RampupBatchsizeNumMicroBatchesCalculator(
        **common, start_global_batch_size=start, batch_size_increment=increment, ramup_samples=samples
    )


def training(
    dataset: Any, *, train: Train, consumed: int, num_workers: int, total: int | None = None
) -> Iterator[Batch]:
    """Endless micro-batches of this rank after the first `consumed` samples: [micro_batch_size, ...] tensors.

    After `total` samples there are only rows that do not count.
    """
    num_ranks = parallel.size("dp")
    batches = sampler.TrainingBatches(
        size=len(dataset),
        seed=train.seed,
        consumed=consumed,
        batch_size_at=batch_size_at(train, data_parallel_size=num_ranks),
        micro_batch_size=train.sequences_per_pass(num_ranks),
        rank=parallel.rank("dp"),
        num_ranks=num_ranks,
        total=total,
    )
    return iter(_loader(dataset, batches, num_workers=num_workers))


def num_evaluation_samples(dataset: Any, train: Train) -> int:
    """The first train.eval_samples of the validation set, or all if it has no more."""
    return len(dataset) if train.eval_samples is None else min(train.eval_samples, len(dataset))


def evaluation(dataset: Any, *, train: Train, num_microbatches: int) -> Iterator[Batch]:
    """So many micro-batches of this rank for one evaluation: the samples in order, then some that do not count."""
    rank, num_ranks = parallel.rank("dp"), parallel.size("dp")
    micro_batch_size = train.sequences_per_pass(num_ranks)
    room, num_samples = num_microbatches * micro_batch_size * num_ranks, num_evaluation_samples(dataset, train)
    ids = [*range(num_samples), *[sampler.FILLER] * (room - num_samples)]
    batches = sampler.rank_micro_batches(ids, micro_batch_size=micro_batch_size, rank=rank, num_ranks=num_ranks)
    return iter(_loader(dataset, batches, num_workers=0))


def _loader(dataset: Any, batches: Iterable[Sequence[int]], *, num_workers: int) -> Iterable[Batch]:
    # Page-locked memory lets the copy to the device run beside the computation.
    pinned = platform.device().type != "cpu"
    return loader.loader(dataset, batches=batches, num_workers=num_workers, pin_memory=pinned)


def recorded(batches: Iterator[Batch], path: Path, *, train: Train, after: Position) -> Iterator[Batch]:
    """`batches`, the first one of the step after `after`; a line "STEP: ID ID ..." is appended to `path` for each that
    is read and has samples that count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_ranks = parallel.size("dp")
    size_at = batch_size_at(train, data_parallel_size=num_ranks)
    step, consumed = after.step, after.consumed_samples
    with path.open("a", buffering=1) as file:
        while True:
            step, samples = step + 1, size_at(consumed)
            consumed += samples
            for batch in itertools.islice(batches, samples // (train.sequences_per_pass(num_ranks) * num_ranks)):
                if ids := [str(index) for index in batch["sample_id"].tolist() if index != sampler.FILLER]:
                    file.write(f"{step}: {' '.join(ids)}\n")
                yield batch


def forget_after(step: int, directory: Path) -> None:
    """Take out of the files that `recorded` wrote into `directory` what was read after `step`, as it is read again."""
    for path in directory.glob("*.txt"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if int(line.partition(":")[0]) <= step))
