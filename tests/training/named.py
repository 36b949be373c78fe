"""A data source for tests: training samples of `masked`, and two sets held out that have names and different sizes."""

from dataclasses import dataclass
from pathlib import Path

from bridge.data.source import Datasets, Prepared
from tests.training import masked

NEWS, CODE = 9, 4


@dataclass(frozen=True)
class Config(masked.Config):
    """The options of `mock`."""

    source: str = "tests.training.named"


def prepare(config: Config, *, cache: Path, seed: int) -> Prepared:
    return masked.prepare(config, cache=cache, seed=seed)


def build(config: Config, prepared: Prepared, *, seed: int) -> Datasets:
    train, valid = masked.build(config, prepared, seed=seed)
    news, code = ([valid[index] for index in range(*part)] for part in ((0, NEWS), (NEWS, NEWS + CODE)))
    return Datasets(train, {"news": news, "code": code})
