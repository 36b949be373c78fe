"""A data source for tests: samples of different lengths that share rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy

from bridge.data import mock
from bridge.data.encode.encoded import Encoded
from bridge.data.samples.packed import Packed
from bridge.data.samples.store import Store, write
from bridge.data.source import Datasets, Prepared, completed

LENGTHS = [9, 3, 12, 5, 7, 4, 11, 6, 8, 10, 5, 13, 4, 6, 9, 7, 3, 12, 8, 17]  # tokens


@dataclass(frozen=True)
class Config(mock.Config):
    """The options of `mock`."""

    source: str = "tests.training.packed_source"


def prepare(config: Config, *, cache: Path, seed: int) -> Prepared:
    drawn = numpy.random.RandomState(seed)
    samples = [Encoded(drawn.randint(0, 100, size).tolist(), [1.0] * size, "file", 1) for size in LENGTHS]
    entry = completed(cache / "packed_source", fill=lambda directory: write(directory, samples))
    return Prepared(entry, config.vocab_size)


def build(config: Config, prepared: Prepared, *, seed: int) -> Datasets:
    assert prepared.directory is not None
    store, every = Store(prepared.directory), numpy.arange(len(LENGTHS))
    return Datasets(Packed(store, every, sequence_length=config.sequence_length, seed=seed), None)
