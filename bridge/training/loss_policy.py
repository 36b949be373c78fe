"""What to do about a loss that is not finite or suddenly high: the train.nonfinite_loss and train.spiking_loss keys."""

import math
import statistics
from collections import deque
from typing import Literal, NamedTuple

from bridge.checkpoint import Position
from bridge.config.run_config import RunConfig

WINDOW = 100  # accepted steps whose median loss is what a spike is measured against
LEAST = 10  # of them before any loss is called a spike


class Verdict(NamedTuple):
    """What was found about one step. action: None when nothing was. nonfinite, spikes: such steps so far, this one
    included; left out or not. message: one line for the console."""

    nonfinite: int
    spikes: int
    action: Literal["error", "skip", "continue"] | None = None
    message: str = ""


class LossPolicy:
    """Judges every step once, in order, with numbers that are the same on all ranks; so is what it answers."""

    def __init__(self, config: RunConfig, progress: Position) -> None:
        self.train = config.train
        # For a step to be left out its loss must be known: one wait for the device and all ranks per step. A rerun
        # waits as well, and compares with the losses up to the last step.
        skipping = "skip" in (self.train.nonfinite_loss, self.train.spiking_loss)
        self.judges_before_update = skipping or config.rerun.mode != "disabled"
        self.nonfinite, self.spikes = progress.nonfinite, progress.spikes
        self.recent = deque(progress.recent_losses, maxlen=WINDOW)

    def judge(self, step: int, *, loss: float, grad_norm: float) -> Verdict:
        """Judge `step` by its mean loss and the norm of its gradient (or NaN: not finite, or any finite number)."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                self.nonfinite += 1
                return self._verdict(step, f"{name} is {value}", "nonfinite_loss")
        if self.is_spike(loss):
            self.spikes += 1
            median = statistics.median(self.recent)
            if self.train.spiking_loss == "continue":
                self.recent.append(loss)
            found = f"loss {loss:.4g} is above {self.train.loss_spike_factor:g} times the median {median:.4g} before it"
            return self._verdict(step, found, "spiking_loss")
        self.recent.append(loss)
        return self.nothing()

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is too high against the last accepted steps."""
        enough = len(self.recent) >= LEAST
        return enough and loss > self.train.loss_spike_factor * statistics.median(self.recent)

    def nothing(self) -> Verdict:
        """The verdict on a step in which nothing was found, or which has no loss."""
        return Verdict(self.nonfinite, self.spikes)

    def remembered(self, progress: Position) -> Position:
        """`progress` with what a resumed run needs to judge as this one would have."""
        return progress._replace(nonfinite=self.nonfinite, spikes=self.spikes, recent_losses=tuple(self.recent))

    def _verdict(self, step: int, found: str, key: str) -> Verdict:
        action = getattr(self.train, key)
        ending = {
            "error": "training stops; the last checkpoint was saved before this step. Lower optimizer.lr, lengthen "
            f"scheduler.lr_warmup_steps, look at this step's data, or skip such steps with train.{key}=skip",
            "skip": f"the step is skipped (train.{key}=skip)",
            "continue": f"training continues (train.{key}=continue)",
        }
        return Verdict(self.nonfinite, self.spikes, action, f"step {step}: {found}; {ending[action]}")
