"""The mean loss over a fixed part of the validation split."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bridge.config.schema import Train
from bridge.training import batches
from bridge.training.step import Shape, evaluation_step, global_means


def evaluate(model: list[Any], dataset: Any, *, train: Train, shape: Shape) -> float:
    """Loss in nats per token over `train.eval_iters` global batches of `dataset`. A collective call.

    `shape.num_microbatches` is that of a full global batch. Dropout is off; parameters and generators are left alone.
    """
    iterators = [batches.evaluation(dataset, train=train) for _ in model]
    losses = []
    with _evaluating(model):
        for _ in range(batches.num_evaluation_batches(dataset, train)):
            losses.append(evaluation_step(model, iterators, shape))
    return global_means([torch.stack(losses).sum(dim=0)])[0]


@contextmanager
def _evaluating(model: list[Any]) -> Iterator[None]:
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model:
            chunk.train()
