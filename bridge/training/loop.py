"""The training loop: steps, and between them reports, evaluations, saves and the question whether to stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from bridge import parallel
from bridge.checkpoint import Position
from bridge.data.batch import Batch
from bridge.objectives import passes
from bridge.objectives.passes import Shape
from bridge.optim import schedule
from bridge.runs import run_files
from bridge.training import batches, flops
from bridge.training.best import Best
from bridge.training.evaluate import evaluate
from bridge.training.loss_policy import LossPolicy
from bridge.training.metrics import Pending, Rates, Report, Step
from bridge.training.metrics import read as read_metrics
from bridge.training.pulse import COMPUTING, EVALUATING, REPORTING, SAVING, STARTING, Pulse
from bridge.training.rerun import Ending, Rerun
from bridge.training.saves import Saves
from bridge.training.setup import Job
from bridge.training.step import StepResult, shape_of, train_step
from bridge.training.stop import Stop
from bridge.training.stragglers import Stragglers
from bridge.weights import pointer
from bridge.weights.pointer import iteration_directory


class HardwareFault(RuntimeError):
    """The rerun state machine's last word on a loss it rejected."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. stopped: before its last step, saved unless checkpoint.save is false. eval_loss: the last one,
    nats per token. step: the last one taken; None for a model that was only evaluated and records no step."""

    status: Literal["done", "stopped"]
    step: int | None
    eval_loss: float | None
    reason: str | None = None


def train(job: Job, *, stop: Stop, report: Report, pulse: Pulse, saves: Saves) -> Outcome:
    """Run `job` to its last step, until train.patience is over or until `stop` has a reason.

    Raises FloatingPointError for a loss that train.nonfinite_loss or train.spiking_loss calls an error, HardwareFault
    for a result that another computation contradicts, both before anything of that step is saved.
    """
    progress, length = job.progress, job.length
    pulse.enter(STARTING, step=progress.step)
    policy = LossPolicy(job.config, progress)
    rerun = Rerun(job.config, policy, step=progress.step, model=job.state.model)
    stragglers = Stragglers(job.config.log.straggler_interval, pulse, job.state.model)
    pending = Pending(_rates(job), policy, consumed_tokens=_consumed_tokens(job))
    between = _Between(job, report, saves, pulse, pending=pending, rerun=rerun, stragglers=stragglers)
    iterators = rerun.iterators(_training_batches(job, pulse))
    step_of = partial(train_step, job.objective, job.state, iterators, policy=policy, rerun=rerun)
    take_step = partial(step_of, before_update=saves.before_update)
    batch_size_at = batches.batch_size_at(job.config.train, data_parallel_size=parallel.size("dp"))
    ended = between.best.ending(progress.step) if progress.step < length.steps else None
    reason = stop.signalled() if progress.step < length.steps else None  # while the model was built
    while progress.step < length.steps and reason is None and ended is None:
        step, consumed = progress.step + 1, progress.consumed_samples
        samples = batch_size_at(consumed)
        shape = _shape(job, samples)
        lr = schedule.learning_rate(job.state.optimizer)
        pulse.enter(COMPUTING, step=step)
        if step in job.config.train.iterations_to_skip:
            result = StepResult(passes.only_read(job.objective, iterators, job.state.model, shape))
        else:
            stragglers.begin_step()
            result = take_step(shape, step=step)
        if result.ending is not None:
            between.end_for_rerun(progress, result.ending)
            return Outcome("stopped", progress.step, between.eval_loss, result.ending.message)
        progress = progress._replace(
            step=step,
            consumed_samples=consumed + length.counted(consumed, samples),
            skipped=progress.skipped + (not result.updated),
        )
        pending.add(Step(step, result, lr, progress.consumed_samples, progress.skipped))
        reason = None if step == length.steps else stop.reason(step=step)
        pulse.finish_step()  # at about the same moment on all ranks
        ended = between.after(progress, consumed_before=consumed, leaving=reason is not None, is_error=result.is_error)
    _say(ended)
    pulse.enter(SAVING)  # what the caller waits for
    status: Literal["done", "stopped"] = "done" if reason is None or ended is not None else "stopped"
    return Outcome(status, progress.step, between.eval_loss, None if status == "done" else reason)


class _Between:
    """What is due between two steps: reports, evaluations, saves. All ranks call the same.

    eval_loss: of the last evaluation, also of one before a resume.
    """

    def __init__(
        self,
        job: Job,
        report: Report,
        saves: Saves,
        pulse: Pulse,
        *,
        pending: Pending,
        rerun: Rerun,
        stragglers: Stragglers,
    ) -> None:
        self._job, self._report, self._saves, self._pulse = job, report, saves, pulse
        self._pending, self._rerun, self._stragglers = pending, rerun, stragglers
        self.best = Best(job.config, job.progress)
        self.eval_loss = _evaluation_at(job, job.progress.step)

    def after(self, progress: Position, *, consumed_before: int, leaving: bool, is_error: bool) -> str | None:
        """Do what is due after the step at `progress`; one line when the run ends with it, as train.patience is over.

        consumed_before: the samples up to the step before. Raises FloatingPointError as `train`.
        """
        config, step, length = self._job.config, progress.step, self._job.length
        is_due = partial(length.is_due, step=step, before=consumed_before, after=progress.consumed_samples)
        last = step == length.steps
        evaluating = last or is_due(config.train.eval_interval)
        saving = config.checkpoint.save and (last or leaving or is_due(config.checkpoint.save_interval))
        if evaluating or saving or leaving or is_error or is_due(config.log.log_interval):
            _report(self._pending, self._report)
            _say(self._rerun.statistics())
        _say(self._stragglers.report(step))
        is_best, ended = False, None
        if evaluating and self._job.valid:
            found = _evaluate(self._job, self._pulse)
            self._report.write({"step": step} | found)
            self.eval_loss = found["eval_loss"]
            is_best = self.best.judge(step, found) and self.best.is_kept
            ended = None if last else self.best.ending(step)
        saving = saving or is_best or (config.checkpoint.save and ended is not None)
        if saving:
            self._save(progress, is_best=is_best)
        else:
            self._saves.poll(step)
        if evaluating or saving:
            self._pending.restart_clock()
        return ended

    def end_for_rerun(self, progress: Position, ending: Ending) -> None:
        """Save what megatron-core's rerun state machine wants kept. Raises HardwareFault if that was its last word."""
        _report(self._pending, self._report)
        self._saves.finish()
        root = self._job.checkpoints
        if ending.save and pointer.read(root) != iteration_directory(root, iteration=progress.step):
            self._save(progress)
            self._saves.finish()
        self._rerun.leave(ending, step=progress.step)
        if not ending.resumable:
            raise HardwareFault(ending.message)

    def _save(self, progress: Position, *, is_best: bool = False) -> None:
        self._pulse.enter(SAVING)
        with _gathered_parameters(self._job.state.model):
            self._saves.save(self.best.remembered(self._pending.remembered(progress)), is_best=is_best)
        self._pulse.enter(REPORTING)


def _shape(job: Job, samples: int) -> Shape:
    length = job.data.options.sequence_length
    return shape_of(job.config.train, sequence_length=length, samples=samples, dataset=job.datasets.train)


def _report(pending: Pending, report: Report) -> None:
    """Write all steps not yet reported. Raises FloatingPointError on every rank at one that is an error."""
    for line, verdict in pending.take():
        report.write(line)
        if verdict.action == "error":
            raise FloatingPointError(verdict.message)
        _say(verdict.message)


def _say(line: str | None) -> None:
    if line and parallel.is_main():
        print(line, flush=True)


def _rates(job: Job) -> Rates:
    per_token = partial(flops.per_token, job.transformer, vocab_size=job.config.model["vocab_size"])
    without_attention = per_token(sequence_length=0)
    return Rates(
        without_attention,
        per_token(sequence_length=1) - without_attention,
        parallel.size(),
        job.length.samples_per_epoch,
    )


def _consumed_tokens(job: Job) -> int:
    """Before the next step. A checkpoint of an earlier version tells of samples alone, then all of one length."""
    known = job.progress.consumed_tokens
    return job.progress.consumed_samples * job.data.options.sequence_length if known is None else known


def _training_batches(job: Job, pulse: Pulse) -> list[Iterator[Batch]]:
    """One iterator per model chunk; all give the same batches."""
    config = job.config
    iterators = [
        batches.training(
            job.datasets.train,
            train=config.train,
            consumed=job.progress.consumed_samples,
            num_workers=job.data.options.num_workers,
            total=job.length.samples,
        )
        for _ in job.state.model
    ]
    if config.log.sample_ids:
        iterators[0] = _recorded(iterators[0], job)
    return [pulse.reading(iterator) for iterator in iterators]


def _recorded(iterator: Iterator[Batch], job: Job) -> Iterator[Batch]:
    """`iterator`; of the ranks that read the same samples one writes their ids into RUN_DIR/sample_ids."""
    directory = job.config.run_dir / run_files.SAMPLE_IDS
    if parallel.is_main():
        batches.forget_after(job.progress.step, directory)
    parallel.barrier()
    first_of_its_samples = parallel.rank("tp") == 0 and parallel.rank("cp") == 0 and parallel.is_pipeline_first_stage()
    if not first_of_its_samples:
        return iterator
    path = directory / f"data_parallel_{parallel.rank('dp')}.txt"
    return batches.recorded(iterator, path, train=job.config.train, after=job.progress)


def _evaluate(job: Job, pulse: Pulse) -> dict[str, float]:
    with _gathered_parameters(job.state.model):
        found = evaluate(
            job.objective,
            job.state.model,
            job.valid,
            train=job.config.train,
            sequence_length=job.data.options.sequence_length,
            advance=partial(pulse.enter, EVALUATING),
        )
    pulse.enter(REPORTING)
    return found


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
