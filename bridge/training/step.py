"""One optimizer step, and one pass without gradients. Read `train_step` from top to bottom."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config, unwrap_model

from bridge import parallel, platform
from bridge.checkpoint import Trainable
from bridge.config.schema import Train
from bridge.training.batches import Batch
from bridge.training.loss_policy import LossPolicy, Verdict
from bridge.training.rerun import Ending, Rerun, kept_buffers

INPUTS = ("tokens", "labels", "loss_mask", "position_ids")


class Shape(NamedTuple):
    """Sizes megatron-core's schedules ask for. sequence_length: tokens per sequence, before context parallelism."""

    sequence_length: int
    micro_batch_size: int
    num_microbatches: int


def shape_of(train: Train, *, sequence_length: int, samples: int) -> Shape:
    """The shape of a step that reads `samples` over all data-parallel ranks, which are whole micro-batches of each."""
    num_ranks = parallel.size("dp")
    micro_batch_size = train.sequences_per_pass(num_ranks)
    return Shape(sequence_length, micro_batch_size, samples // (micro_batch_size * num_ranks))


class StepResult(NamedTuple):
    """loss: this rank's [sum of token losses, number of tokens], float64 on the device; see `global_means`. None for a
    step that was passed over.
    grad_norm: L2 norm of the whole gradient before clipping, None for a step that was left out.
    verdict: on the loss, where it was needed before the update. ending: the run ends before this step's update."""

    loss: torch.Tensor | None
    grad_norm: float | None = None
    updated: bool = False
    verdict: Verdict | None = None
    ending: Ending | None = None

    @property
    def is_error(self) -> bool:
        """Whether the verdict ends the run."""
        return self.verdict is not None and self.verdict.action == "error"


def train_step(
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
        loss = _forward_backward(state.model, batches, shape, forward_only=False)
        rerun.validate(loss)
    if (ending := rerun.ending(step=step)) is not None:
        return StepResult(loss, ending=ending)

    verdict = None
    if put_back_buffers is not None:
        mean, gradient = _loss_and_gradient(loss, state.model)
        verdict = policy.judge(step, loss=mean, grad_norm=gradient)
        if verdict.action in ("skip", "error"):
            put_back_buffers()
            return StepResult(loss, verdict=verdict)
    before_update()
    updated, grad_norm, _ = state.optimizer.step()
    if updated:
        state.scheduler.step(1)
    return StepResult(loss, None if grad_norm is None else float(grad_norm), bool(updated), verdict)


def pass_over(state: Trainable, batches: list[Iterator[Batch]], shape: Shape) -> StepResult:
    """Read what `train_step` would read, and do nothing with it. The learning rate's schedule waits."""
    for chunk, iterator in zip(unwrap_model(state.model), batches, strict=True):
        if chunk.pre_process or chunk.post_process:
            for _ in range(shape.num_microbatches):
                next(iterator)
    return StepResult(None)


def _loss_and_gradient(loss: torch.Tensor, model: list[Any]) -> tuple[float, float]:
    """The mean loss over all ranks' tokens, and NaN if any rank has a gradient that is not finite, else 0. The same
    on all ranks, which wait for each other here."""
    wrong = torch.zeros(1, dtype=loss.dtype, device=loss.device)
    if not get_model_config(model[0]).fp16:  # its loss scaler looks for them itself, and expects some
        for chunk in model:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                wrong += ~torch.isfinite(buffer.grad_data.sum(dtype=torch.float32))
    sums = torch.cat([loss, wrong])
    torch.distributed.all_reduce(sums)
    total, num_tokens, num_wrong = sums.tolist()
    return total / num_tokens, math.nan if num_wrong else 0.0


@torch.no_grad()
def evaluation_step(model: list[Any], batches: list[Iterator[Batch]], shape: Shape) -> torch.Tensor:
    """[sum of token losses, number of tokens] of this rank, float64; nothing is changed."""
    return _forward_backward(model, batches, shape, forward_only=True)


def global_means(losses: list[torch.Tensor]) -> list[float]:
    """Mean loss in nats per token of each step, over the tokens of all ranks. A collective call.

    Ranks without the last pipeline stage add zeros; tensor-parallel ranks each add the same numbers, which cancels.
    """
    sums = torch.stack(losses)
    torch.distributed.all_reduce(sums)
    return (sums[:, 0] / sums[:, 1]).tolist()


def _forward_backward(
    model: list[Any], batches: list[Iterator[Batch]], shape: Shape, *, forward_only: bool
) -> torch.Tensor:
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=shape.num_microbatches,
        seq_length=shape.sequence_length,
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )
    if not losses:  # not the last pipeline stage
        return torch.zeros(2, dtype=torch.float64, device=platform.device())
    return torch.stack([loss["loss"] for loss in losses]).sum(dim=0)


def forward_step(batches: Iterator[Batch], model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """megatron-core's forward_step_func: one micro-batch through one model chunk; the loss function for its output.

    return_schedule_plan: what the chunk would compute, for megatron-core to mix with another chunk's backward pass
    (overlap_moe_expert_parallel_comm).
    """
    chunk = unwrap_model(model)
    run = chunk.build_schedule_plan if return_schedule_plan else model
    if not (chunk.pre_process or chunk.post_process):
        return run(None, None, None), None
    batch = _on_device(next(batches))
    output = run(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, lambda token_losses: token_loss(token_losses, batch["loss_mask"])


def token_loss(losses: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the masked token losses, their number (int), and both for the report. losses, mask: [batch, sequence].

    megatron-core divides the accumulated gradient once by the number of tokens of the whole global batch
    (calculate_per_token_loss), so the result does not depend on how the batch was split.
    """
    mask = mask.view(-1).float()
    total = (losses.view(-1).float() * mask).sum()
    num_tokens = mask.sum()
    report = torch.stack([total.detach(), num_tokens]).double()
    return total, num_tokens.int(), {"loss": report}


def _on_device(batch: Batch) -> Batch:
    moved = {name: batch[name].to(platform.device(), non_blocking=True) for name in INPUTS}
    return get_batch_on_this_cp_rank(moved, cp_group=parallel.group("cp"))
