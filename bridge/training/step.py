"""One optimizer step, and one pass without gradients. Read `train_step` from top to bottom."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model

from bridge import parallel, platform
from bridge.checkpoint import Trainable
from bridge.training.batches import Batch

INPUTS = ("tokens", "labels", "loss_mask", "position_ids")


class Shape(NamedTuple):
    """Sizes megatron-core's schedules ask for. sequence_length: tokens per sequence, before context parallelism."""

    sequence_length: int
    micro_batch_size: int
    num_microbatches: int


class StepResult(NamedTuple):
    """loss: this rank's [sum of token losses, number of tokens], float64 on the device; see `global_means`.
    grad_norm: L2 norm of the whole gradient before clipping, None for a step left out because of infinite gradients."""

    loss: torch.Tensor
    grad_norm: float | None
    updated: bool


def train_step(state: Trainable, batches: list[Iterator[Batch]], shape: Shape) -> StepResult:
    """Forward and backward over `num_microbatches` of each of `batches` (one iterator per model chunk), then update."""
    for chunk in state.model:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()

    loss = _forward_backward(state.model, batches, shape, forward_only=False)
    updated, grad_norm, _ = state.optimizer.step()
    if updated:
        state.scheduler.step(1)
    return StepResult(loss, None if grad_norm is None else float(grad_norm), bool(updated))


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
    return get_batch_on_this_cp_rank(moved, cp_group=parallel.context_parallel_group())
