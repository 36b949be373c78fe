"""The training loop: steps, and between them reports, evaluations, saves and the question whether to stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from bridge import parallel
from bridge.optim import schedule
from bridge.training import batches, flops
from bridge.training.batches import Batch
from bridge.training.evaluate import evaluate
from bridge.training.metrics import Pending, Rates, Report, Step
from bridge.training.metrics import read as read_metrics
from bridge.training.saves import Saves
from bridge.training.setup import Job
from bridge.training.step import Shape, train_step
from bridge.training.stop import Stop


@dataclass(frozen=True)
class Outcome:
    """How a run ended. stopped: saved before its last step, to be resumed. eval_loss: the last one, nats per token."""

    status: Literal["done", "stopped"]
    step: int
    eval_loss: float | None
    reason: str | None = None


def train(job: Job, *, stop: Stop, report: Report, saves: Saves) -> Outcome:
    """Run `job` to its last step or until `stop` has a reason."""
    train = job.config.train
    progress = job.progress
    pending = Pending(_rates(job))
    iterators = _training_batches(job)
    batch_size_at = batches.batch_size_at(train, data_parallel_size=parallel.data_parallel_size())
    eval_loss = _evaluation_at(job, progress.step)
    reason = None
    while progress.step < train.steps and reason is None:
        samples = batch_size_at(progress.consumed_samples)
        lr = schedule.learning_rate(job.state.optimizer)
        result = train_step(job.state, iterators, _shape(job, samples))
        progress = progress._replace(
            step=progress.step + 1,
            consumed_samples=progress.consumed_samples + samples,
            skipped=progress.skipped + (not result.updated),
        )
        pending.add(Step(progress.step, result, lr, samples, progress.consumed_samples, progress.skipped))

        last = progress.step == train.steps
        reason = None if last else stop.reason(step=progress.step)
        evaluating = last or _due(progress.step, train.eval_interval)
        saving = last or reason is not None or _due(progress.step, job.config.checkpoint.save_interval)
        if evaluating or saving or _due(progress.step, job.config.log.log_interval):
            for line in pending.take():
                report.write(line)
        if evaluating and job.datasets.valid is not None:
            eval_loss = _evaluate(job)
            report.write({"step": progress.step, "eval_loss": eval_loss})
        if saving:
            with _gathered_parameters(job.state.model):
                saves.save(progress)
        else:
            saves.poll(progress.step)
        if evaluating or saving:
            pending.restart_clock()
    return Outcome("done" if reason is None else "stopped", progress.step, eval_loss, reason)


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _shape(job: Job, samples: int) -> Shape:
    num_ranks = parallel.data_parallel_size()
    micro_batch_size = job.config.train.sequences_per_pass(num_ranks)
    num_microbatches = samples // (micro_batch_size * num_ranks)
    return Shape(job.data.options.sequence_length, micro_batch_size, num_microbatches)


def _rates(job: Job) -> Rates:
    sequence_length = job.data.options.sequence_length
    return Rates(
        flops_per_token=flops.per_token(
            job.transformer, vocab_size=job.config.model["vocab_size"], sequence_length=sequence_length
        ),
        sequence_length=sequence_length,
        num_devices=parallel.world_size(),
    )


def _training_batches(job: Job) -> list[Iterator[Batch]]:
    """One iterator per model chunk; all give the same batches."""
    config = job.config
    iterators = [
        batches.training(
            job.datasets.train,
            train=config.train,
            consumed=job.progress.consumed_samples,
            num_workers=job.data.options.num_workers,
        )
        for _ in job.state.model
    ]
    if config.log.sample_ids and parallel.tensor_parallel_rank() == 0 and parallel.is_pipeline_first_stage():
        path = config.run_dir / "sample_ids" / f"data_parallel_{parallel.data_parallel_rank()}.txt"
        iterators[0] = batches.recorded(iterators[0], path)
    return iterators


def _evaluate(job: Job) -> float:
    train = job.config.train
    with _gathered_parameters(job.state.model):
        return evaluate(job.state.model, job.datasets.valid, train=train, shape=_shape(job, train.global_batch_size))


def _evaluation_at(job: Job, step: int) -> float | None:
    """The evaluation loss reported at `step` by the process that saved it; a resumed run need not repeat it."""
    if step == 0:
        return None
    lines = [line for line in read_metrics(job.config.run_dir) if line["step"] == step]
    return next((line["eval_loss"] for line in lines if "eval_loss" in line), None)


@contextmanager
def _gathered_parameters(model: list[Any]) -> Iterator[None]:
    """Whole, current parameters outside of training steps.

    With overlap_param_gather the update's parameters arrive during the next training forward; here they must be there.
    """
    overlapped = [chunk for chunk in model if chunk.use_forward_hook]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
