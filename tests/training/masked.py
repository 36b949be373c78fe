"""A data source for tests: random tokens that count differently, so that means of means go wrong."""

from dataclasses import dataclass
from typing import Any

from bridge.data import mock
from bridge.data.source import Datasets, Prepared


@dataclass(frozen=True)
class Config(mock.Config):
    """The options of `mock`."""

    source: str = "tests.training.masked"


prepare = mock.prepare


def build(config: Config, prepared: Prepared, *, seed: int) -> Datasets:
    train, valid = mock.build(config, prepared, seed=seed)
    return Datasets(Masked(train), Masked(valid))


class Masked:
    """Sample i counts only its first (i mod 5 + 1) fifths, and of those every third token a quarter."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self.dataset[index])
        mask = sample["loss_mask"].clone()
        mask[len(mask) * (index % 5 + 1) // 5 :] = 0
        mask[::3] /= 4
        return {**sample, "loss_mask": mask}
