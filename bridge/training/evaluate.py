"""The mean loss, and what else an objective measures, over a fixed part of the validation split."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import get_model_config

from bridge import parallel
from bridge.config.schema import Train
from bridge.objectives import passes
from bridge.objectives.objective import Objective
from bridge.objectives.passes import Shape
from bridge.training import batches
from bridge.training.step import shape_of


def evaluate(
    objective: Objective,
    model: list[Any],
    dataset: Any,
    *,
    train: Train,
    sequence_length: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """eval_loss and the objective's other numbers over the first `train.eval_samples` of `dataset`. A collective call.

    The same whatever the batch sizes and the layout: what is lacking to whole micro-batches on all ranks is filled up
    with samples that do not count. Dropout is off; parameters and generators are left alone.
    advance: called before each step.
    """
    shape = shape_of(train, sequence_length=sequence_length, samples=train.global_batch_size)
    num_samples = batches.num_evaluation_samples(dataset, train)
    sizes = _step_sizes(num_samples, shape=shape, multiple=_multiple(model, shape))
    iterators = [batches.evaluation(dataset, train=train, num_microbatches=sum(sizes)) for _ in model]
    measured = []
    with _evaluating(model), torch.no_grad():
        for size in sizes:
            advance()
            of_this_step = shape._replace(num_microbatches=size)
            measured.append(passes.run(objective, iterators, model, of_this_step, forward_only=True))
    sums = torch.stack([one.sums for one in measured]).sum(dim=0)
    (found,) = passes.totals([measured[0]._replace(sums=sums)])
    return {f"eval_{name}": value for name, value in found.numbers.items()}


def _step_sizes(num_samples: int, *, shape: Shape, multiple: int) -> list[int]:
    """Micro-batches of each step: as many as in training, in the last what is left, rounded up to a `multiple`."""
    num_microbatches = -(-num_samples // (shape.micro_batch_size * parallel.size("dp")))
    full, left = divmod(num_microbatches, shape.num_microbatches)
    last = min(-(-left // multiple) * multiple, shape.num_microbatches)
    return [shape.num_microbatches] * full + [last] * (left > 0)


def _multiple(model: list[Any], shape: Shape) -> int:
    """What the number of micro-batches of a step is a multiple of, for megatron-core's schedules."""
    config = get_model_config(model[0])
    if config.cuda_graph_impl != "none":  # which has a graph for each micro-batch of a step, used in turn
        return shape.num_microbatches
    if len(model) == 1:
        return 1
    return config.microbatch_group_size_per_vp_stage or parallel.size("pp")


@contextmanager
def _evaluating(model: list[Any]) -> Iterator[None]:
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model:
            chunk.train()
