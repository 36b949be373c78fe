"""Random tokens, the same for the same seed and index: for benchmarks and tests of everything but the data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.data.source import Datasets, Prepared, SourceConfig, at_least


@dataclass(frozen=True)
class Config(SourceConfig):
    """Uniform random token ids below vocab_size."""

    source: str = "mock"
    vocab_size: int = at_least(1, 2048)
    num_samples: int = at_least(1, 100_000)


def prepare(config: Config, *, cache: Path, seed: int) -> Prepared:
    """Nothing to store: samples are made on the fly."""
    return Prepared(directory=None, vocab_size=config.vocab_size)


def build(config: Config, prepared: Prepared, *, seed: int) -> Datasets:
    """`num_samples` training samples and a hundredth of that, at least one, for validation."""
    return Datasets(
        train=RandomTokens(config, num_samples=config.num_samples, seed=(seed, 0)),
        valid=RandomTokens(config, num_samples=max(config.num_samples // 100, 1), seed=(seed, 1)),
    )


class RandomTokens:
    """A map-style dataset whose sample i depends on the seed and i alone."""

    def __init__(self, config: Config, *, num_samples: int, seed: tuple[int, ...]) -> None:
        self.config, self.num_samples, self.seed = config, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        import numpy
        import torch

        length = self.config.sequence_length
        generator = numpy.random.RandomState([*self.seed, index])
        text = torch.from_numpy(generator.randint(0, self.config.vocab_size, size=length + 1, dtype=numpy.int64))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }
