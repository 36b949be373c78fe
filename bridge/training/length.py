"""How long a run is: train.steps, or as many steps as train.epochs passes over the training samples take."""

from collections.abc import Callable
from typing import NamedTuple

from bridge.checkpoint import Position
from bridge.config.schema import Train
from bridge.errors import ConfigError


class Length(NamedTuple):
    """steps: all of the run, those before a resume included. samples_per_epoch: training samples there are.

    With train.epochs: samples, how many are read in all, and what the last step has of them and of room.
    """

    steps: int
    samples_per_epoch: int
    samples: int | None = None
    last: tuple[int, int] = (0, 0)

    def counted(self, consumed: int, batch_size: int) -> int:
        """How many samples of the step after `consumed` ones count: all, but perhaps in the last step of an epoch."""
        return batch_size if self.samples is None else max(0, min(batch_size, self.samples - consumed))

    def is_due(self, interval: int | str | None, *, step: int, before: int, after: int) -> bool:
        """Whether `interval` (N steps, or epoch) is over with `step`, which took the samples consumed from `before` to
        `after`. An epoch that ends inside a batch is over with that batch."""
        if interval == "epoch":
            return after // self.samples_per_epoch > before // self.samples_per_epoch
        return isinstance(interval, int) and step % interval == 0

    def described(self, epochs: int) -> str:
        """One line about the length that train.epochs comes to."""
        said = f"train.epochs: {epochs} x {self.samples_per_epoch:,} samples are {self.steps:,} steps"
        count, size = self.last
        return said if count == size else f"{said}, the last one with {count} of {size} samples"


def of(train: Train, *, num_samples: int, batch_size_at: Callable[[int], int], progress: Position) -> Length:
    """The length of a run that stands at `progress`, with `num_samples` to train on.

    batch_size_at: see bridge.training.batches. Raises ConfigError when more epochs are done than train.epochs.
    """
    if train.epochs is None:
        return Length(train.num_steps, num_samples)
    step, consumed, samples = progress.step, progress.consumed_samples, train.epochs * num_samples
    if consumed > samples:
        raise ConfigError(
            f"train.epochs: {train.epochs} x {num_samples} samples, but this run has already read {consumed}; set more "
            "epochs to continue, or another name= to train again from the start"
        )
    ramp, size = train.rampup_batch_size[2] if train.rampup_batch_size else -1, 0
    while consumed < samples:
        size = batch_size_at(consumed)
        steps = 1 if consumed <= ramp else -(-(samples - consumed) // size)  # after the ramp all are of one size
        step, consumed = step + steps, consumed + steps * size
    return Length(step, num_samples, samples, (size - (consumed - samples), size))
