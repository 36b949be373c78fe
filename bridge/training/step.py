"""One optimizer step. Read `train_step` from top to bottom."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_model_config

from bridge import parallel
from bridge.checkpoint import Trainable
from bridge.config.schema import Train
from bridge.data.batch import Batch
from bridge.objectives import passes
from bridge.objectives.objective import Objective
from bridge.objectives.passes import Measured, Shape
from bridge.training.loss_policy import LossPolicy, Verdict
from bridge.training.rerun import Ending, Rerun, kept_buffers


def shape_of(train: Train, *, sequence_length: int, samples: int, dataset: Any = None) -> Shape:
    """The shape of a step that reads `samples` of `dataset` over all data-parallel ranks, whole micro-batches of
    each."""
    num_ranks = parallel.size("dp")
    micro_batch_size = train.sequences_per_pass(num_ranks)
    num_microbatches = samples // (micro_batch_size * num_ranks)
    return Shape(sequence_length, micro_batch_size, num_microbatches, getattr(dataset, "rows", "full"))


class StepResult(NamedTuple):
    """measured: what its micro-batches had to say on this rank, still on the device.
    grad_norm: L2 norm of the whole gradient before clipping, None for a step that was left out.
    verdict: on the loss, where it was needed before the update. ending: the run ends before this step's update."""

    measured: Measured
    grad_norm: float | None = None
    updated: bool = False
    verdict: Verdict | None = None
    ending: Ending | None = None

    @property
    def is_error(self) -> bool:
        """Whether the verdict ends the run."""
        return self.verdict is not None and self.verdict.action == "error"


def train_step(
    objective: Objective,
    state: Trainable,
    batches: list[Iterator[Batch]],
    shape: Shape,
    *,
    step: int,
    policy: LossPolicy,
    rerun: Rerun,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward and backward over `num_microbatches` of each of `batches` (one iterator per model chunk), then update."""
    put_back_buffers = kept_buffers(state.model) if policy.judges_before_update else None
    for _ in rerun.attempts(batches, step=step):
        for chunk in state.model:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        measured = passes.run(objective, batches, state.model, shape, forward_only=False)
        rerun.validate(measured.sums[0])
    if (ending := rerun.ending(step=step)) is not None:
        return StepResult(measured, ending=ending)

    verdict = None
    if put_back_buffers is not None:
        mean, gradient = _loss_and_gradient(measured.sums[0], state.model)
        verdict = policy.judge(step, loss=mean, grad_norm=gradient)
        if verdict.action in ("skip", "error"):
            put_back_buffers()
            return StepResult(measured, verdict=verdict)
    before_update()
    updated, grad_norm, _ = state.optimizer.step()
    if updated:
        state.scheduler.step(1)
    return StepResult(measured, None if grad_norm is None else float(grad_norm), bool(updated), verdict)


def _loss_and_gradient(loss: torch.Tensor, model: list[Any]) -> tuple[float, float]:
    """The mean over all ranks, of which this one has `loss`, [sum, divisor], and NaN if any has a gradient that is not
    finite, else 0. The same on all ranks, which wait for each other here."""
    wrong = torch.zeros(1, dtype=loss.dtype, device=loss.device)
    if not get_model_config(model[0]).fp16:  # its loss scaler looks for them itself, and expects some
        for chunk in model:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                wrong += ~torch.isfinite(buffer.grad_data.sum(dtype=torch.float32))
    sums = torch.cat([loss, wrong])
    torch.distributed.all_reduce(sums)
    total, count, num_wrong = sums.tolist()
    return total / count if count else math.nan, math.nan if num_wrong else 0.0
