"""The passes of a step through megatron-core's schedules, for any objective, and what they have to say."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from bridge import parallel, platform
from bridge.data.batch import Batch, to_this_rank
from bridge.data.sampler import FILLER
from bridge.errors import ConfigError
from bridge.models import measures
from bridge.objectives.objective import Objective


class Shape(NamedTuple):
    """Sizes megatron-core's schedules ask for. sequence_length: tokens per sequence, before context parallelism.

    rows: "packed" where samples share rows, "padded" where part of a row is padding; then every stage reads batches.
    """

    sequence_length: int
    micro_batch_size: int
    num_microbatches: int
    rows: Literal["full", "padded", "packed"] = "full"


class Measured(NamedTuple):
    """What the micro-batches of a step have to say on this rank.

    sums: float64 [names, 2] on the device, sum and count of each of `names`: the loss and the objective's numbers, 0 on
    ranks without the last pipeline stage, then the model's own. No names of micro-batches that were only read.
    experts: float64 [layers, experts], the tokens each got (bridge.models.measures).
    tokens, squares: the sum of the lengths of the sequences and of their squares, on the last pipeline stage; context-
    and tensor-parallel ranks, which share sequences, have the same.
    """

    names: tuple[str, ...]
    sums: Tensor
    experts: Tensor
    tokens: int
    squares: int


class Totals(NamedTuple):
    """`Measured` of all ranks together. numbers: name -> mean, `loss` first; NaN where nothing counted."""

    numbers: dict[str, float]
    tokens: int
    squares: int


class _Reported(NamedTuple):
    """Of one micro-batch on the last pipeline stage; sums [1 + objective's numbers, 2]."""

    sums: Tensor
    tokens: int
    squares: int


class _Divisor:
    """What the loss of all micro-batches is divided by, float64: megatron-core itself adds up whole numbers only."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=platform.device())

    @contextmanager
    def instead_of_whole_numbers(self, model: list[Any]) -> Iterator[None]:
        """In the block, whoever finishes the gradients is given this total."""
        config = get_model_config(model[0])
        finish = config.finalize_model_grads_func

        def with_total(chunks: Any, num_tokens: Tensor | None = None, **options: Any) -> Any:
            return finish(chunks, None if num_tokens is None else self.total, **options)

        if finish is not None:
            config.finalize_model_grads_func = with_total
        try:
            yield
        finally:
            config.finalize_model_grads_func = finish


def forward_step(
    objective: Objective,
    divisor: _Divisor,
    every_stage_reads: bool,
    batches: Iterator[Batch],
    model: Any,
    return_schedule_plan: bool = False,
) -> tuple[Any, Any]:
    """megatron-core's forward_step_func: one micro-batch through one model chunk; the loss function for its output.

    return_schedule_plan: what the chunk would compute, for megatron-core to mix with another chunk's backward pass
    (overlap_moe_expert_parallel_comm).
    """
    chunk = unwrap_model(model)
    keys = objective.keys(chunk)
    loaded: Batch = next(batches) if keys or every_stage_reads else {}
    batch = to_this_rank(loaded, keys)
    output = objective.forward(chunk.build_schedule_plan if return_schedule_plan else model, batch)
    return output, partial(_loss, objective, divisor, batch, loaded)


def _loss(
    objective: Objective, divided_by: _Divisor, batch: Batch, loaded: Batch, output: Any
) -> tuple[Tensor, Tensor, _Reported]:
    """megatron-core's loss function: the sum, a whole number (calculate_per_token_loss asks for one, `divided_by` has
    the right one), and what goes into the report."""
    total, divisor, numbers = objective.loss(output, batch)
    divided_by.total += divisor.detach()
    if unknown := numbers.keys() - set(objective.numbers):
        raise ConfigError(f"objective.name: '{objective.name}' reports {min(unknown)}; list it in its `numbers`")
    pairs = [(total, divisor), *(numbers.get(name, (None, None)) for name in objective.numbers)]
    nothing = total.new_zeros((), dtype=torch.float64)
    flat = [nothing if value is None else value.detach().double() for pair in pairs for value in pair]
    return total, divisor.int(), _Reported(torch.stack(flat).view(-1, 2), *_lengths(objective, loaded))


def _lengths(objective: Objective, loaded: Batch) -> tuple[int, int]:
    """The sum of the lengths of the sequences that count, and of their squares."""
    # Where samples share rows, segment_ids tell what counts.
    if "sample_id" in loaded and "segment_ids" not in loaded:
        counts, tensors = loaded["sample_id"] != FILLER, cast(dict[str, Tensor], loaded)
        loaded = cast(Batch, {key: tensor[counts] for key, tensor in tensors.items() if len(tensor) == len(counts)})
    lengths = objective.lengths(loaded)
    return int(lengths.sum()), int((lengths * lengths).sum())


def run(
    objective: Objective, batches: list[Iterator[Batch]], model: list[Any], shape: Shape, *, forward_only: bool
) -> Measured:
    """Forward, and unless `forward_only` backward, over the next micro-batches of `batches`, an iterator per chunk."""
    if not forward_only:
        measures.reset(model)
    divisor = _Divisor()
    step = partial(forward_step, objective, divisor, shape.rows != "full")
    with divisor.instead_of_whole_numbers(model):
        found: list[_Reported] = through_schedule(step, batches, model, shape, forward_only=forward_only)
    names = ("loss", *objective.numbers)
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=platform.device())
    for one in found:
        sums += one.sums
    lengths = sum(one.tokens for one in found), sum(one.squares for one in found)
    if forward_only:
        return Measured(names, sums, _nothing(), *lengths)
    own = measures.collect(model)
    return Measured((*names, *own.names), torch.cat([sums, own.sums]), own.experts, *lengths)


def _nothing() -> Tensor:
    return torch.zeros(0, 2, dtype=torch.float64, device=platform.device())


def through_schedule(
    step: Any, batches: list[Iterator[Batch]], model: list[Any], shape: Shape, **options: Any
) -> list[Any]:
    """megatron-core's schedule for this layout with the forward_step_func `step`: what its loss functions reported,
    one by one; empty but on the last pipeline stage."""
    several = len(model) > 1
    joined = shape.micro_batch_size if shape.rows == "packed" else 1  # rows that became one
    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches if several else batches[0],
        model=model if several else model[0],
        num_microbatches=shape.num_microbatches,
        seq_length=shape.sequence_length * joined,
        micro_batch_size=shape.micro_batch_size // joined,
        **options,
    )
    return reports


def only_read(objective: Objective, batches: list[Iterator[Batch]], model: list[Any], shape: Shape) -> Measured:
    """Read what `run` would read, and do nothing with it."""
    tokens = squares = 0
    for chunk, iterator in zip(unwrap_model(model), batches, strict=True):
        for _ in range(shape.num_microbatches if objective.keys(chunk) or shape.rows != "full" else 0):
            loaded = next(iterator)
            if chunk.post_process:
                more = _lengths(objective, loaded)
                tokens, squares = tokens + more[0], squares + more[1]
    return Measured((), _nothing(), _nothing(), tokens, squares)


def totals(measured: list[Measured]) -> list[Totals]:
    """Each of `measured` over all ranks. A collective call.

    Ranks without the last pipeline stage add zeros; tensor-parallel ranks each add the same numbers, which cancels.
    """
    lengths = torch.tensor([[one.tokens, one.squares] for one in measured], dtype=torch.float64).to(platform.device())
    parts = [tensor for one in measured for tensor in (one.sums, one.experts)]
    flat = torch.cat([lengths.flatten(), *(part.flatten() for part in parts)])
    torch.distributed.all_reduce(flat)
    flat = flat.cpu()  # waits for the device
    sharing = parallel.size("tp") * parallel.size("cp")
    pieces = iter(flat[2 * len(measured) :].split([part.numel() for part in parts]))
    result = []
    for one, counted in zip(measured, (flat[: 2 * len(measured)].view(-1, 2) / sharing).tolist(), strict=True):
        sums, experts = next(pieces).view(-1, 2).tolist(), next(pieces).view(one.experts.shape)
        numbers = {name: _mean(*pair) for name, pair in zip(one.names, sums, strict=True)}
        result.append(Totals(numbers | measures.of_experts(experts), *(round(count) for count in counted)))
    return result


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
