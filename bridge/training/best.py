"""The best evaluation so far: whose checkpoint checkpoint.keep_best keeps, and after how many worse ones a run ends."""

import math
from collections.abc import Collection, Mapping

from bridge.checkpoint import Position
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError, did_you_mean

EVAL_LOSS = "eval_loss"


class Best:
    """Judges every evaluation once, in order; all ranks have the same numbers and come to the same answers."""

    def __init__(self, config: RunConfig, progress: Position) -> None:
        self.metric, self.patience = config.checkpoint.keep_best or EVAL_LOSS, config.train.patience
        self.is_kept, self.highest = config.checkpoint.keep_best is not None, config.checkpoint.best_is == "highest"
        of_another = progress.best_metric not in ("", self._name())
        remembered = Position() if of_another else progress
        self.value, self.step = remembered.best, remembered.best_step
        self.worse = remembered.worse_evaluations

    def judge(self, step: int, found: Mapping[str, float]) -> bool:
        """Whether the evaluation after `step` is the best; one that is not a number never is."""
        value = found[self.metric]
        better = self.value is None or (value > self.value if self.highest else value < self.value)
        improved = better and not math.isnan(value)
        if improved:
            self.value, self.step, self.worse = value, step, 0
        else:
            self.worse += 1
        return improved

    def ending(self, step: int) -> str | None:
        """One line that says why the run ends with `step`, when it has been patient for long enough."""
        if self.patience is None or self.worse < self.patience:
            return None
        evaluations = "1 evaluation" if self.worse == 1 else f"{self.worse} evaluations"
        before = "" if self.value is None else f" than the {self.value:.4f} of step {self.step}"
        wanted = "higher" if self.highest else "lower"
        return f"train.patience: {evaluations} without a {wanted} {self.metric}{before}; the run ends with step {step}"

    def remembered(self, progress: Position) -> Position:
        """`progress` with what a resumed run needs to judge as this one would have."""
        return progress._replace(
            best_metric=self._name(), best=self.value, best_step=self.step, worse_evaluations=self.worse
        )

    def _name(self) -> str:
        return f"{'highest' if self.highest else 'lowest'} {self.metric}"


def check(config: RunConfig, metrics: Collection[str]) -> None:
    """Raise ConfigError unless evaluations report what checkpoint.keep_best and train.patience go by; `metrics`: what
    they do report, empty when nothing is held out."""
    for key, value in (
        ("checkpoint.keep_best", config.checkpoint.keep_best),
        ("train.patience", config.train.patience),
    ):
        if value is not None and not metrics:
            raise ConfigError(f"{key}: {value} goes by evaluations, but the data holds nothing out; hold some out")
    metric = config.checkpoint.keep_best
    if metric is not None and metric not in metrics:
        raise ConfigError(
            f"checkpoint.keep_best: '{metric}' is not among what evaluations report, {', '.join(metrics)}; set one of "
            f"these{did_you_mean(metric, metrics)}"
        )
