"""Log-probabilities of tokens under a live model whose vocabulary is divided over tensor-parallel ranks.

With logits z, temperature T and label y, log p = z_y / T - log sum_v exp(z_v / T). Each rank has some columns v: the
largest logit, the sum and z_y are put together by two all-reduces of one number per token. No rank sees all columns.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from bridge import parallel, platform
from bridge.api.tasks import chunks_of
from bridge.data.batch import Batch, to_this_rank
from bridge.errors import ConfigError
from bridge.objectives.next_token import NextToken
from bridge.objectives.passes import Shape, through_schedule
from bridge.weights import shards

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
IGNORED = -100  # a label that stands for none, torch's and transformers' convention
CHUNK = 2**24  # logits cast to float32 at a time: 64 MB


def logprobs(
    model: Any, batch: Mapping[str, Tensor], *, temperature: float = 1.0, micro_batch_size: int | None = None
) -> Tensor:
    """Log-probability of each label, float32 [batch, sequence], the same on all ranks that share `batch`.

    batch["tokens"]: int64 [batch, sequence]. batch["labels"]: what position t should predict; without it the next
    token, and 0 at the last position. Negative labels, and positions where batch["loss_mask"] is 0, give 0.
    batch["position_ids"]: 0, 1, ... unless given. micro_batch_size: sequences per pass (None: all).

    Differentiable, unless there are pipeline stages or context-parallel ranks: then call it under torch.no_grad(), and
    to train put `logprobs_from_logits` into the loss function of megatron-core's schedule to train. Dropout and the
    like are as the model is (`eval()`). Raises ConfigError.
    """
    chunks = chunks_of(model)
    full = _complete(batch)
    rows = micro_batch_size or len(full["tokens"])
    _check(chunks, full, rows=rows)
    starts = range(0, len(full["tokens"]), rows)
    micro_batches = [to_this_rank({name: full[name][at : at + rows] for name in full}, full) for at in starts]
    if parallel.size("pp") == 1:
        bare = shards.unwrap(chunks[0])  # Float16Module would make a float32 copy of all logits
        results = [_of_output(_forward(bare, micro), micro, bare, temperature) for micro in micro_batches]
        return _whole_sequences(torch.cat(results))
    return _through_stages(chunks, micro_batches, temperature=temperature)


def logprobs_from_logits(logits: Tensor, labels: Tensor, *, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """The same from this rank's logits [..., padded vocabulary / TP] and labels [...]: float32 [...], differentiable.

    vocab_size: the true one; the padding columns beyond it have no probability and no gradient. Negative labels give 0,
    labels beyond the vocabulary NaN. Beside the logits, which are kept, the gradient with respect to them is the only
    tensor of their size.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature: {temperature} is not positive; set 1.0 for the model's own distribution")
    if labels.shape != logits.shape[:-1]:
        raise ConfigError(f"labels: shape {list(labels.shape)} does not fit logits {list(logits.shape)}")
    columns, num_ranks = logits.shape[-1], parallel.size("tp")
    if columns * num_ranks < vocab_size:
        raise ConfigError(
            f"logits: {columns} columns on {num_ranks} tensor-parallel ranks do not hold vocab_size={vocab_size}"
        )
    result: Tensor = _LogProbs.apply(logits, labels, vocab_size, temperature)
    return result


class _LogProbs(torch.autograd.Function):
    """See `logprobs_from_logits`. Keeps the logits as they are, and two numbers per token, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, temperature: float) -> Tensor:
        first = parallel.rank("tp") * logits.shape[-1]
        real = min(max(vocab_size - first, 0), logits.shape[-1])
        flat, wanted = logits.reshape(-1, logits.shape[-1])[:, :real], labels.reshape(-1)
        exact = torch.promote_types(logits.dtype, torch.float32)
        top = flat.amax(dim=-1).to(exact) if real else flat.new_full((len(flat),), -torch.inf, dtype=exact)
        _reduce(top, torch.distributed.ReduceOp.MAX)

        sums = torch.zeros(2, len(flat), dtype=exact, device=logits.device)  # of exponentials; the labels' own logits
        for rows in _chunks(flat):
            sums[0, rows] = ((flat[rows].to(exact) - top[rows, None]) / temperature).exp_().sum(dim=-1)
        own = ((wanted >= first) & (wanted < first + real)).nonzero()[:, 0]
        column = wanted[own] - first
        sums[1, own] = (flat[own, column].to(exact) - top[own]) / temperature
        _reduce(sums, torch.distributed.ReduceOp.SUM)

        log_sum = sums[0].log()
        ctx.save_for_backward(logits, top, log_sum, own, column, wanted)
        ctx.real, ctx.temperature = real, temperature
        result = (sums[1] - log_sum).masked_fill_(wanted < 0, 0.0).masked_fill_(wanted >= vocab_size, torch.nan)
        return result.view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """d log p / d z_v = ((v == y) - p_v) / T."""
        logits, top, log_sum, own, column, wanted = ctx.saved_tensors
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        flat, into = (whole.reshape(-1, logits.shape[-1]) for whole in (logits, result))
        scale = (grad.reshape(-1) / ctx.temperature).masked_fill(wanted < 0, 0.0)
        into[:, ctx.real :] = 0
        for rows in _chunks(flat[:, : ctx.real]):
            shifted = (flat[rows, : ctx.real].to(top.dtype) - top[rows, None]).div_(ctx.temperature)
            into[rows, : ctx.real] = shifted.sub_(log_sum[rows, None]).exp_().mul_(-scale[rows, None]).to(into.dtype)
        # Once more in full precision: the label's entry is a small difference of numbers that may be close.
        p_label = ((flat[own, column].to(top.dtype) - top[own]) / ctx.temperature - log_sum[own]).exp_()
        into[own, column] = (scale[own] * (1 - p_label)).to(into.dtype)
        return result, None, None, None


def _chunks(flat: Tensor) -> Iterator[slice]:
    """Rows whose float32 copies stay small."""
    step = max(1, CHUNK // max(1, flat.shape[-1]))
    return (slice(start, start + step) for start in range(0, len(flat), step))


def _reduce(values: Tensor, operation: Any) -> None:
    if parallel.size("tp") > 1:
        torch.distributed.all_reduce(values, op=operation, group=parallel.group("tp"))


def _complete(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """tokens, labels and position_ids [batch, sequence] on this device; masked labels are IGNORED."""
    unknown = [name for name in batch if name not in KEYS]
    if unknown or "tokens" not in batch:
        raise ConfigError(f"batch: has {', '.join(batch)}; give tokens, and as needed {', '.join(KEYS[1:])}")
    moved = {name: tensor.to(platform.device()) for name, tensor in batch.items()}
    tokens = moved["tokens"]
    for name, tensor in moved.items():
        if tensor.shape != tokens.shape or tensor.ndim != 2:
            raise ConfigError(f"batch: {name} has shape {list(tensor.shape)}; all are [batch, sequence] like tokens")
    labels = moved.get("labels")
    if labels is None:
        labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    if "loss_mask" in moved:
        labels = labels.masked_fill(moved["loss_mask"] == 0, IGNORED)
    positions = moved.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return {"tokens": tokens, "labels": labels, "position_ids": positions}


def _check(chunks: list[Any], full: Mapping[str, Tensor], *, rows: int) -> None:
    batch_size, length = full["tokens"].shape
    config = get_model_config(chunks[0])
    divided = parallel.size("pp") > 1 or parallel.size("cp") > 1
    if divided and torch.is_grad_enabled():
        raise ConfigError(
            "logprobs: gradients do not cross pipeline stages or context-parallel ranks here; call it under "
            "torch.no_grad(), and train with logprobs_from_logits in the loss function of megatron-core's schedule"
        )
    if parallel.size("pp") > 1 and batch_size % rows:
        raise ConfigError(f"micro_batch_size: {batch_size} % {rows} must be 0 with pipeline stages; set a divisor")
    if len(chunks) > 1 and batch_size // rows % parallel.size("pp"):
        raise ConfigError(
            f"micro_batch_size: {batch_size} / {rows} passes must be a multiple of the {parallel.size('pp')} "
            "pipeline stages with virtual stages; set it so"
        )
    parts = 2 * parallel.size("cp") if parallel.size("cp") > 1 else 1
    parts *= parallel.size("tp") if config.sequence_parallel else 1
    if length % parts:
        raise ConfigError(f"batch: sequence {length} % {parts} must be 0 for the ranks that share a sequence; pad it")


def _forward(chunk: Any, micro: Batch) -> Any:
    """What an objective's forward gives without labels: logits on the last stage."""
    objective = NextToken()
    ends = objective.keys(shards.unwrap(chunk))
    return objective.forward(chunk, Batch(tokens=micro["tokens"], position_ids=micro["position_ids"]) if ends else {})


def _of_output(logits: Tensor, micro: Batch, chunk: Any, temperature: float) -> Tensor:
    vocab_size = shards.unwrap(chunk).true_vocab_size
    return logprobs_from_logits(logits, micro["labels"], vocab_size=vocab_size, temperature=temperature)


def _through_stages(chunks: list[Any], micro_batches: list[Batch], *, temperature: float) -> Tensor:
    """By megatron-core's schedule; then the last stage tells the others, who need the numbers for their losses too."""

    def forward_step(micros: Iterator[Batch], chunk: Any) -> Any:
        micro = next(micros)
        return _forward(chunk, micro), lambda logits, non_loss_data: _of_output(logits, micro, chunk, temperature)

    rows, length = micro_batches[0]["tokens"].shape
    shape = Shape(length * parallel.size("cp"), rows, len(micro_batches))
    batches = [iter(micro_batches) for _ in chunks]
    options = {"forward_only": True, "collect_non_loss_data": True}
    results = through_schedule(forward_step, batches, chunks, shape, **options)
    if parallel.is_pipeline_last_stage():
        values = _whole_sequences(torch.cat(results))
    else:
        values = torch.empty(
            rows * len(micro_batches), shape.sequence_length, dtype=torch.float32, device=platform.device()
        )
    torch.distributed.broadcast(values, src=parallel.last_stage_rank(), group=parallel.group("pp"))
    return values


def _whole_sequences(part: Tensor) -> Tensor:
    """Of C ranks, number r has pieces r and 2 C - 1 - r of every sequence; the pieces of all in order."""
    size = parallel.size("cp")
    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=parallel.group("cp"))
    halves = [half for one in parts for half in one.chunk(2, dim=1)]
    return torch.cat([*halves[0::2], *reversed(halves[1::2])], dim=1)
