"""The same samples in rows of their own, packed, and one behind the other: one set of processes for many models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.training.runs import FP32, config

LENGTH, ROWS, NUM_MICROBATCHES = 24, 2, 4


class Seen(NamedTuple):
    """Of a model whose samples lie in rows of their own: the loss. wrong: what other ways to read them change."""

    loss: float
    wrong: list[str]


def compare_all(
    models: Mapping[str, dict[str, Any]],
    parallelism: dict[str, Any],
    stored: Path,
    folder: Path,
    precision: dict[str, Any] = FP32,
    tolerance: float = 1e-5,
) -> dict[str, Seen]:
    """Loss, gradients, counted tokens and what routers count of each model, in each way, up to `tolerance`."""
    from bridge.training import setup

    seen = {}
    for number, (name, model) in enumerate(models.items()):
        print(f"--- {name}", flush=True)
        run = config(
            folder,
            name=name,
            whole_model=model,
            parallelism=parallelism,
            precision=precision,
            data={"sequence_length": LENGTH},
            train={"global_batch_size": ROWS * NUM_MICROBATCHES, "micro_batch_size": ROWS},
        )
        if number == 0:
            setup.join(run)
        job = setup.build(run, setup.prepare_data(run))
        ways = _ways(stored, same_length=parallelism.get("pipeline_model_parallel_size", 1) > 1)
        rows = ways.pop("rows")
        expected = _result(job, *rows)
        wrong = []
        for way, how in ways.items():
            wrong += [f"{way}: {line}" for line in _differences(_result(job, *how), expected, tolerance)]
        seen[name] = Seen(expected.numbers["loss"], wrong)
    return seen


class Result(NamedTuple):
    numbers: dict[str, float]
    tokens: int
    squares: int
    gradients: dict[str, Tensor]
    biases: dict[str, Tensor]


def _ways(stored: Path, *, same_length: bool) -> dict[str, tuple[list[dict[str, Tensor]], Any]]:
    """This rank's micro-batches and their shape, in each way."""
    import numpy

    from bridge import parallel
    from bridge.data.samples.packed import Packed
    from bridge.data.samples.rows import Rows, Unpadded
    from bridge.data.samples.store import Store
    from bridge.objectives.passes import Shape

    store = Store(stored)
    full = numpy.flatnonzero(store.lengths)
    empty = int(numpy.flatnonzero(store.lengths == 0)[0])
    packed = Packed(store, full, sequence_length=LENGTH, seed=3)
    assert len(packed) == ROWS * NUM_MICROBATCHES, len(packed)
    mine = range(parallel.rank("dp"), NUM_MICROBATCHES, parallel.size("dp"))
    numbers = [list(range(ROWS * at, ROWS * at + ROWS)) for at in mine]
    samples = [[int(one) for row in rows for one in packed.of_row(row)] for rows in numbers]
    most = max(len(one) for one in parallel.all_gather(samples) for one in one)
    together = [one + [empty] * (most - len(one)) for one in samples]

    def collated(dataset: Any, batches: list[list[int]]) -> list[dict[str, Tensor]]:
        collate = getattr(dataset, "collate", torch.utils.data.default_collate)
        return [collate([dataset[index] for index in batch]) for batch in batches]

    every = numpy.arange(len(store))
    rows, longest = (Rows(store, every, sequence_length=LENGTH) for _ in range(2))
    longest.collate.longest = True
    free = Unpadded(store, every, sequence_length=LENGTH)
    count = len(numbers)
    ways = {
        "rows": (collated(rows, together), Shape(LENGTH, most, count, "padded")),
        "packed": (collated(packed, numbers), Shape(LENGTH, ROWS, count, "packed")),
    }
    if not same_length:
        ways["padding_free"] = (collated(free, samples), Shape(LENGTH, most, count, "packed"))
        ways["longest"] = (collated(longest, samples), Shape(LENGTH, most, count, "padded"))
    return ways


def _result(job: Any, batches: list[dict[str, Tensor]], shape: Any) -> Result:
    from bridge.objectives import passes

    before = {name: bias.clone() for name, bias in _biases(job.state.model).items()}
    for chunk in job.state.model:
        chunk.zero_grad_buffer()
    iterators = [iter(batches) for _ in job.state.model]
    measured = passes.run(job.objective, iterators, job.state.model, shape, forward_only=False)
    (totals,) = passes.totals([measured])
    gradients = {
        f"{number}.{name}": parameter.main_grad.clone()
        for number, chunk in enumerate(job.state.model)
        for name, parameter in chunk.named_parameters()
    }
    after = {name: bias.clone() for name, bias in _biases(job.state.model).items()}
    for name, bias in _biases(job.state.model).items():  # which finishing the gradients has moved
        bias.copy_(before[name])
    return Result(totals.numbers, totals.tokens, totals.squares, gradients, after)


def _biases(model: list[Any]) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": buffer
        for number, chunk in enumerate(model)
        for name, buffer in chunk.named_buffers()
        if name.endswith("expert_bias")
    }


def _differences(found: Result, expected: Result, tolerance: float) -> list[str]:
    wrong = []
    for name, value in expected.numbers.items():
        if not abs(found.numbers[name] - value) <= tolerance * abs(value):
            wrong.append(f"{name} is {found.numbers[name]}, not {value}")
    if found[1:3] != expected[1:3]:
        wrong.append(f"counts {found[1:3]}, not {expected[1:3]}")
    for key in ("gradients", "biases"):
        for name, tensor in getattr(expected, key).items():
            off, norm = (getattr(found, key)[name] - tensor).norm().item(), tensor.norm().item()
            if not off <= tolerance * norm + 1e-7:
                wrong.append(f"{key} of {name}: off by {off:.1e} of {norm:.1e}")
    return wrong
