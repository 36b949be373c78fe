"""The lines that a run prints about its steps and evaluations, and how long it will still take."""

import time
from collections.abc import Mapping
from typing import Any

from bridge.config import durations


class TimeLeft:
    """How long the steps that are left will take, by the time since the first step that was asked about.

    So the first step's own time, which says nothing about the others, does not count; evaluations and saves since do.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.first: tuple[int, float] | None = None

    def after(self, step: int, *, step_seconds: float | None = None) -> float | None:
        """Seconds from now, just after `step`; by `step_seconds` when asked for the first time. None: not known."""
        now = time.monotonic()
        if self.first is None or step < self.first[0]:
            self.first = step, now
        first, since = self.first
        per_step = step_seconds if step == first else (now - since) / (step - first)
        return None if per_step is None else per_step * (self.steps - step)


def evaluated(found: Mapping[str, Any]) -> list[str]:
    """What an evaluation found: the loss of all, then of each set that has a name, with the perplexity."""
    parts = []
    for metric, value in found.items():
        number, _, name = metric.partition("/")
        if number == "eval_loss":
            perplexity = found.get(metric.replace("loss", "perplexity", 1))
            inside = "" if perplexity is None else f" (perplexity {perplexity:.4g})"
            parts.append(f"{name or 'eval loss'} {value:.4f}{inside}")
    return parts


class Console:
    """One line per report: the last step's values and the time left, or the evaluation's loss."""

    def __init__(self, *, steps: int, log_interval: int, shows_flops: bool) -> None:
        self.steps, self.log_interval, self.shows_flops = steps, log_interval, shows_flops
        self.time_left = TimeLeft(steps)

    def write(self, line: Mapping[str, Any]) -> None:
        if "eval_loss" in line:
            print(" | ".join([f"step {line['step']}/{self.steps}", *evaluated(line)]), flush=True)
        elif "lr" in line and (line["step"] % self.log_interval == 0 or line["step"] == self.steps):
            print(" | ".join(self._parts(line)), flush=True)

    def _parts(self, line: Mapping[str, Any]) -> list[str]:
        parts = [
            f"step {line['step']}/{self.steps}",
            "loss none" if line["loss"] is None else f"loss {line['loss']:.4f}",
            "grad norm skipped" if line["grad_norm"] is None else f"grad norm {line['grad_norm']:.3f}",
            f"lr {line['lr']:.2e}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
        ]
        if self.shows_flops:
            parts.append(f"{line['tflops_per_gpu']:.3g} TFLOP/s per device")
        parts.append(f"{line['step_seconds']:.3g} s per step")
        left = self.time_left.after(line["step"], step_seconds=line["step_seconds"])
        if left is not None and line["step"] < self.steps:
            parts.append(f"{durations.text(left)} left")
        return parts

    def close(self) -> None: ...
