"""Encoded samples on disk, one after the other, and read from there: nothing holds them all in memory.

tokens.bin     int32, the tokens of all samples
weights.bin    float32, as many
samples.npy    int64 [samples, 3]: tokens of the samples up to and with this one, number of its file, line
files.json     the files' paths
"""

import json
import shutil
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from bridge.data.encode.encoded import Encoded

TOKENS, WEIGHTS, INDEX, FILES = "tokens.bin", "weights.bin", "samples.npy", "files.json"


class Sample(NamedTuple):
    """tokens: int32 [length]. weights: float32 [length], how much predicting that token counts. Both are not copied."""

    tokens: NDArray[numpy.int32]
    weights: NDArray[numpy.float32]
    file: str
    line: int


def write(directory: Path, samples: Iterable[Encoded]) -> None:
    """Write `samples` into an existing `directory`, in their order."""
    ends, total, files = array("q"), 0, dict[str, int]()
    with (directory / TOKENS).open("wb") as tokens, (directory / WEIGHTS).open("wb") as weights:
        for sample in samples:
            assert len(sample.tokens) == len(sample.weights)
            total += len(sample.tokens)
            numpy.asarray(sample.tokens, dtype=numpy.int32).tofile(tokens)
            numpy.asarray(sample.weights, dtype=numpy.float32).tofile(weights)
            ends.extend((total, files.setdefault(sample.file, len(files)), sample.line))
    _write_index(directory, numpy.frombuffer(ends, dtype=numpy.int64).reshape(-1, 3), files)


def merge(directories: Iterable[Path], into: Path) -> None:
    """Write into an existing directory what `write` of the samples of all `directories`, in their order, would."""
    indices, total, files = [numpy.empty((0, 3), dtype=numpy.int64)], 0, dict[str, int]()
    with (into / TOKENS).open("wb") as tokens, (into / WEIGHTS).open("wb") as weights:
        for directory in directories:
            index, names = _read_index(directory)
            numbers = [files.setdefault(name, len(files)) for name in names]
            index[:, 0] += total
            index[:, 1] = numpy.array(numbers, dtype=numpy.int64)[index[:, 1]]
            total = int(index[-1, 0]) if len(index) else total
            indices.append(index)
            for name, whole in ((TOKENS, tokens), (WEIGHTS, weights)):
                with (directory / name).open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 22)
    _write_index(into, numpy.concatenate(indices), files)


def is_whole(directory: Path) -> bool:
    """Whether `directory` has all that `write` wrote; one that a crash of the machine cut off has not."""
    try:
        index, _ = _read_index(directory)
        sizes = {(directory / name).stat().st_size for name in (TOKENS, WEIGHTS)}
    except (OSError, ValueError, EOFError):
        return False
    return sizes == {4 * int(index[-1, 0]) if len(index) else 0}


def _write_index(directory: Path, index: NDArray[numpy.int64], files: Iterable[str]) -> None:
    numpy.save(directory / INDEX, index)
    (directory / FILES).write_text(json.dumps([*files]))


def _read_index(directory: Path) -> tuple[NDArray[numpy.int64], list[str]]:
    return numpy.load(directory / INDEX), json.loads((directory / FILES).read_text())


class Store:
    """The samples that `write` left in `directory`. Pickled, it is its path: files are mapped, not sent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._index = numpy.load(directory / INDEX, mmap_mode="r")
        self._files = json.loads((directory / FILES).read_text())
        self._tokens = _mapped(directory / TOKENS, numpy.int32)
        self._weights = _mapped(directory / WEIGHTS, numpy.float32)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def lengths(self) -> NDArray[numpy.int64]:
        """Tokens of each sample, int64 [samples]."""
        return numpy.diff(self._index[:, 0], prepend=0)

    @property
    def rows(self) -> NDArray[numpy.int64]:
        """Number of the row that each sample was made of, from 0, int64 [samples]."""
        sources = self._index[:, 1:]
        return numpy.cumsum(numpy.any(numpy.diff(sources, axis=0, prepend=sources[:1]), axis=1), dtype=numpy.int64)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        end, file, line = map(int, self._index[index])
        part = slice(int(self._index[index - 1, 0]) if index else 0, end)
        return Sample(self._tokens[part], self._weights[part], self._files[file], line)

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.directory,)


def _mapped(path: Path, dtype: type) -> NDArray:
    """The numbers in a file; an empty one cannot be mapped."""
    return numpy.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else numpy.empty(0, dtype=dtype)
