"""The mean loss, and what else an objective measures, over a fixed part of each set held out."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_model_config

from bridge import parallel
from bridge.config.schema import Train
from bridge.errors import ConfigError, shown
from bridge.objectives import passes
from bridge.objectives.objective import Objective
from bridge.objectives.passes import Measured, Shape
from bridge.training import batches
from bridge.training.step import shape_of

UNNAMED = ""  # the name of a set that is alone and has none


def sets(valid: Any) -> dict[str, Any]:
    """Name -> dataset of `Datasets.valid`: none, one under UNNAMED, or those that have names.

    Raises ConfigError for a name that cannot be part of a metric's, and for an empty set.
    """
    if valid is None:
        return {}
    if not isinstance(valid, Mapping):
        return {UNNAMED: valid}
    for name, dataset in valid.items():
        if not isinstance(name, str) or not name or set(name) & set("/\\ "):
            raise ConfigError(
                f"data.eval: {shown(name)} cannot name an evaluation set; use a text without '/' and spaces"
            )
        if len(dataset) == 0:
            raise ConfigError(f"data.eval.{name}: holds no sample; leave it out, or give it some text")
    return dict(valid)


def metrics_of(objective: Objective, names: Iterable[str]) -> list[str]:
    """What `evaluate` reports of sets with these names: eval_loss, eval_loss/NAME, ..."""
    numbers = ["loss", *objective.numbers, *(["perplexity"] if objective.has_perplexity else [])]
    places = [UNNAMED, *(name for name in names if name != UNNAMED)]
    return [_metric(number, place) for place in places for number in numbers]


def evaluate(
    objective: Objective,
    model: list[Any],
    valid: Mapping[str, Any],
    *,
    train: Train,
    sequence_length: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """eval_loss, eval_perplexity and the objective's other numbers over the first `train.eval_samples` of each set of
    `valid` (`sets`), all together and, as eval_loss/NAME, of each that has a name. A collective call.

    The same whatever the batch sizes and the layout: what is lacking to whole micro-batches on all ranks is filled up
    with samples that do not count. Dropout is off; parameters and generators are left alone.
    advance: called before each step.
    """
    step = partial(shape_of, train, sequence_length=sequence_length, samples=train.global_batch_size)
    with _evaluating(model), torch.no_grad():
        measured = [
            _of_set(objective, model, dataset, train, step(dataset=dataset), advance) for dataset in valid.values()
        ]
    sums = torch.stack([one.sums for one in measured]).sum(dim=0)
    names = [UNNAMED, *(name for name in valid if name != UNNAMED)]
    of_each = [] if UNNAMED in valid else measured
    found: dict[str, float] = {}
    for name, total in zip(names, passes.totals([measured[0]._replace(sums=sums), *of_each]), strict=True):
        numbers = dict(total.numbers)
        if objective.has_perplexity:
            numbers["perplexity"] = perplexity(numbers["loss"])
        found |= {_metric(number, name): value for number, value in numbers.items()}
    return found


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that is larger than any float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _metric(number: str, name: str) -> str:
    return f"eval_{number}/{name}" if name else f"eval_{number}"


def _of_set(
    objective: Objective, model: list[Any], dataset: Any, train: Train, shape: Shape, advance: Callable[[], None]
) -> Measured:
    """The sums over one set."""
    num_samples = batches.num_evaluation_samples(dataset, train)
    sizes = _step_sizes(num_samples, shape=shape, multiple=_multiple(model, shape))
    iterators = [batches.evaluation(dataset, train=train, num_microbatches=sum(sizes)) for _ in model]
    measured = []
    for size in sizes:
        advance()
        of_this_step = shape._replace(num_microbatches=size)
        measured.append(passes.run(objective, iterators, model, of_this_step, forward_only=True))
    return measured[0]._replace(sums=torch.stack([one.sums for one in measured]).sum(dim=0))


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
