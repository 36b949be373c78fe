"""What a run reports and where: metrics.jsonl always; console, TensorBoard and Weights & Biases as asked.

metrics.jsonl has one JSON object per line: of a training step (TRAINING, then what the objective and the model
measure), of an evaluation, of a finished save. docs/metrics.md has every name.
"""

import dataclasses
import importlib
import json
import math
import secrets
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from bridge import platform
from bridge.checkpoint import Position
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError, RunError, shown
from bridge.files import write_text
from bridge.models import measures
from bridge.objectives import passes
from bridge.objectives.objective import Objective
from bridge.objectives.passes import Totals
from bridge.runs import run_files
from bridge.training import environment
from bridge.training.console import Console
from bridge.training.loss_policy import LossPolicy, Verdict
from bridge.training.step import StepResult

TRAINING = (
    "step",  # number of the optimizer step, from 1
    "loss",  # nats per token, mean over the global batch; null when it is not finite or the step was passed over
    "grad_norm",  # L2 norm of the whole gradient before clipping; null when it is not finite or the step was left out
    "lr",  # learning rate the step used
    "consumed_samples",  # sequences read since the start of the run, this step included
    "epoch",  # consumed_samples divided by the number of training samples
    "consumed_tokens",  # their tokens, padding left out
    "tokens_per_second",  # of all ranks together
    "tflops_per_gpu",  # model TFLOP/s of each device (bridge.training.flops)
    "step_seconds",  # mean over the steps between two reports
    "skipped",  # steps left out so far: infinite gradients (fp16), train.iterations_to_skip, the next two with `skip`
    "nonfinite",  # steps so far whose loss or gradient was not finite (train.nonfinite_loss)
    "spikes",  # steps so far with a sudden loss (train.spiking_loss)
    "peak_memory_bytes",  # of rank 0's device so far
)

Values = Mapping[str, Any]


def check_names(objective: Objective, config: Any) -> None:
    """Raises ConfigError for a number of the objective that has the name of another value of a line."""
    taken = {*TRAINING, "time", *measures.names(config), *measures.TOKENS_PER_EXPERT}
    if doubled := taken.intersection(objective.numbers):
        raise ConfigError(
            f"objective.name: '{objective.name}' reports {min(doubled)}, a name that every report has; give it another "
            "one in its `numbers`"
        )


class Rates(NamedTuple):
    """What turns seconds into rates, and samples into epochs. A sequence of s tokens costs s flops_per_token +
    s^2 flops_per_square."""

    flops_per_token: float
    flops_per_square: float
    num_devices: int
    samples_per_epoch: int


class Step(NamedTuple):
    """One step as the loop saw it; what it measured is still on the device."""

    step: int
    result: StepResult
    lr: float
    consumed_samples: int
    skipped: int


class Pending:
    """Steps whose loss nobody has looked at: reading a loss waits for the device, so it is done once per report."""

    def __init__(self, rates: Rates, policy: LossPolicy, *, consumed_tokens: int) -> None:
        self.rates, self.policy, self.consumed_tokens = rates, policy, consumed_tokens
        self.steps: list[Step] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what happened since the last report (evaluation, saving) from the next steps' time."""
        platform.synchronize()
        self.started = time.perf_counter()

    def add(self, step: Step) -> None:
        """Keep a step for the next report."""
        self.steps.append(step)

    def take(self) -> list[tuple[dict[str, Any], Verdict]]:
        """The lines of all steps kept since the last call, and what was found about each. A collective call."""
        if not self.steps:
            return []
        totals = passes.totals([step.result.measured for step in self.steps])
        platform.synchronize()
        seconds = (time.perf_counter() - self.started) / len(self.steps)
        taken = []
        for step, total in zip(self.steps, totals, strict=True):
            verdict = self._verdict(step, total.numbers.get("loss"))
            self.consumed_tokens += total.tokens
            taken.append((self._line(step, total, verdict, seconds), verdict))
        self.steps = []
        self.restart_clock()
        return taken

    def _verdict(self, step: Step, loss: float | None) -> Verdict:
        if step.result.verdict is not None:
            return step.result.verdict
        if loss is None:
            return self.policy.nothing()
        return self.policy.judge(step.step, loss=loss, grad_norm=step.result.grad_norm or 0.0)

    def remembered(self, progress: Position) -> Position:
        """`progress` with what a resumed run needs to report and judge as this one would have. After `take`."""
        return self.policy.remembered(progress)._replace(consumed_tokens=self.consumed_tokens)

    def _line(self, step: Step, total: Totals, verdict: Verdict, seconds: float) -> dict[str, Any]:
        rates = self.rates
        flops = total.tokens * rates.flops_per_token + total.squares * rates.flops_per_square
        values = (
            step.step,
            total.numbers.get("loss"),
            step.result.grad_norm,
            step.lr,
            step.consumed_samples,
            step.consumed_samples / rates.samples_per_epoch,
            self.consumed_tokens,
            total.tokens / seconds,
            flops / seconds / rates.num_devices / 1e12,
            seconds,
            step.skipped,
            verdict.nonfinite,
            verdict.spikes,
            platform.peak_memory_bytes(),
        )
        return dict(zip(TRAINING, values, strict=True)) | {k: v for k, v in total.numbers.items() if k != "loss"}


class Sink(Protocol):
    """A place lines go to. Every line has "step"."""

    def write(self, line: Values) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """RUN_DIR/metrics.jsonl, cut back to the step a run resumes from so that no step appears twice."""

    def __init__(self, run_dir: Path, *, resumed_step: int) -> None:
        path = run_dir / run_files.METRICS
        kept = [line for line in read(run_dir) if line["step"] <= resumed_step]
        write_text("".join(json.dumps(line) + "\n" for line in kept), path)
        self.file = path.open("a", buffering=1)

    def write(self, line: Values) -> None:
        # JSON has no NaN: a reader other than Python's would refuse the line.
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self.file.write(json.dumps({**finite, "time": round(time.time(), 3)}, allow_nan=False) + "\n")

    def close(self) -> None:
        self.file.close()


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line cut short by a kill is left out."""
    path = run_dir / run_files.METRICS
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class TensorBoard:
    """RUN_DIR/tensorboard; events after the step a run resumes from are hidden. `texts` are shown by their names."""

    def __init__(self, run_dir: Path, *, resumed_step: int, texts: Mapping[str, Any]) -> None:
        _require("tensorboard", key="log.tensorboard", value=True)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)
        for name, content in texts.items():
            as_code = textwrap.indent(yaml.safe_dump(content, sort_keys=False), "    ")  # in Markdown
            self.writer.add_text(name, as_code, resumed_step)

    def write(self, line: Values) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A W&B run whose id is kept in RUN_DIR/wandb_run_id, so that a resumed run continues it."""

    def __init__(self, config: RunConfig, *, environment: Mapping[str, Any]) -> None:
        options = config.log.wandb
        _require("wandb", key="log.wandb.project", value=options.project)
        import wandb

        kept = config.run_dir / "wandb_run_id"
        if not kept.is_file():
            kept.write_text(secrets.token_hex(8))
        self.run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name or config.name,
            group=options.group,
            tags=options.tags,
            mode=options.mode,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(config.run_dir),
            config={**dataclasses.asdict(config), "environment": dict(environment)},
        )

    def write(self, line: Values) -> None:
        self.run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        self.run.finish()


def _require(package: str, *, key: str, value: Any) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{key}: {shown(value)} needs a package that is missing; pip install {package}") from error


class Report:
    """Sends lines to all sinks of the main process; the other processes have none."""

    def __init__(self, config: RunConfig, *, resumed_step: int, is_main: bool) -> None:
        self.sinks: list[Sink] = []
        self.run_dir = config.run_dir
        if not is_main:
            return
        config.run_dir.mkdir(parents=True, exist_ok=True)
        started = environment.describe(step=resumed_step)
        environment.record(started, config.run_dir)
        if config.log.tensorboard:
            texts = {"config": dataclasses.asdict(config), "environment": started}
            self.sinks.append(TensorBoard(config.run_dir, resumed_step=resumed_step, texts=texts))
        if config.log.wandb.project is not None:
            self.sinks.append(WeightsAndBiases(config, environment=started))
        self.sinks.append(JsonLines(config.run_dir, resumed_step=resumed_step))
        shows_flops = platform.device().type != "cpu"
        train, log = config.train, config.log
        self.sinks.append(Console(steps=train.num_steps, log_interval=log.log_interval, shows_flops=shows_flops))

    def write(self, line: Values) -> None:
        """Send one line everywhere. Raises RunError when the disk refuses it."""
        for sink in self.sinks:
            try:
                sink.write(line)
            except OSError as error:
                raise RunError(f"{self.run_dir}: a report cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in self.sinks:
            sink.close()
