"""One step's gradients of a live model, for programs with a loop of their own."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from megatron.core.utils import get_model_config

from bridge.api.tasks import chunks_of
from bridge.data.batch import Batch
from bridge.errors import ConfigError
from bridge.objectives import passes
from bridge.objectives.objective import Objective


def forward_backward(
    model: Any, batches: Sequence[Batch | Mapping[str, Any]], objective: Objective, *, forward_only: bool = False
) -> dict[str, float]:
    """The gradients of `objective` over micro-batches, and means over all ranks: `loss`, the objective's numbers, and
    of a model with experts or prediction modules its own. A collective call.

    batches: this rank's micro-batches, of one shape on all ranks; ranks that differ in tensor, context or pipeline
    number alone give the same. `tokens` is int64 [batch, sequence], whole sequences; the others are what the objective
    reads. Gradients of earlier calls are dropped; those of a model in DDP whose configuration has megatron-core's
    finalize_model_grads as finalize_model_grads_func are ready for the optimizer's step. forward_only: no gradients;
    dropout is as the model is (`eval()`). Raises ConfigError without micro-batches, or for a model that would divide
    the gradient by something else than the objective's divisor.
    """
    chunks = chunks_of(model)
    if not batches:
        raise ConfigError("batches: there are none; give at least one micro-batch")
    if not get_model_config(chunks[0]).calculate_per_token_loss:
        raise ConfigError(
            "calculate_per_token_loss: false would make the loss depend on the micro-batches; set it to true in the "
            "provider before finalize()"
        )
    rows, length = batches[0]["tokens"].shape
    if not forward_only:
        for chunk in chunks:
            if hasattr(chunk, "zero_grad_buffer"):
                chunk.zero_grad_buffer()
    iterators = [iter(cast(Sequence[Batch], batches)) for _ in chunks]
    kind: Any = "packed" if "segment_ids" in batches[0] else "padded" if "padding_mask" in batches[0] else "full"
    shape = passes.Shape(length, rows, len(batches), kind)
    with torch.set_grad_enabled(not forward_only):
        measured = passes.run(objective, iterators, chunks, shape, forward_only=forward_only)
    (found,) = passes.totals([measured])
    return found.numbers
