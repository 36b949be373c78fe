"""A data source for tests: training samples of `masked`, and two sets held out that have names and different sizes."""

from dataclasses import dataclass

from bridge.data import mock
from bridge.data.source import Datasets, Prepared
from tests.training import masked

NEWS, CODE = 9, 4


@dataclass(frozen=True)
class Config(masked.Config):
    """The options of `mock`."""

    source: str = "tests.training.named"


prepare = mock.prepare


def build(config: Config, prepared: Prepared, *, seed: int) -> Datasets:
    train, valid = masked.build(config, prepared, seed=seed)
    news, code = ([valid[index] for index in range(*part)] for part in ((0, NEWS), (NEWS, NEWS + CODE)))
    return Datasets(train, {"news": news, "code": code})
