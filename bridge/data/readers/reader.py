"""From the files of a path to their rows. Imports no torch."""

import importlib
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from bridge.data.readers.files import File, Malformed, Meter, Named, resolved
from bridge.errors import ConfigError


class Row(NamedTuple):
    """One document or record of a file."""

    value: Any
    """Its text, or the record as a dict."""
    file: str
    line: int
    """Where it begins, from 1; the number of the record where a format has no lines."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}:{self.line}"


def rows(
    path: str | Sequence[str], *, key: str = "data.path", meter: Meter | None = None, part: int = 0, parts: int = 1
) -> Iterator[Row]:
    """The rows of `path`, one at a time: files, folders, globs or URLs, in the order given; in a folder by name.

    A path that ends in :N gives its first N rows. `meter` is told what is read.
    Of `parts` parts, each of files that follow each other, only `part` is read. Raises ConfigError, which names `key`,
    the file and the line.
    """
    found = resolved(path, key=key)
    whole = [each for named in found for each in ([named] if named.limit is not None else _one_by_one(named))]
    for files, limit in whole[len(whole) * part // parts : len(whole) * (part + 1) // parts]:
        read = (row for file in files for row in of_file(file, key=key, meter=meter or Meter()))
        yield from read if limit is None else islice(read, limit)


def _one_by_one(named: Named) -> list[Named]:
    return [Named([file], None) for file in named.files]


def of_file(file: File, *, key: str, meter: Meter) -> Iterator[Row]:
    """The rows of one file."""
    module = importlib.import_module(f"bridge.data.readers.{file.format}")
    line = 0
    try:
        for line, value in module.rows(file, meter):
            yield Row(value, file.name, line)
    except Malformed as error:
        raise ConfigError(f"{key}: {file.name}:{error.line} {error}") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        after = f" after line {line}" if line else ""
        raise ConfigError(f"{key}: {file.name} cannot be read{after} ({reason}); mend or remove it") from error


def check(path: str | Sequence[str], *, key: str = "data.path") -> Row:
    """The first row of `path`. Raises ConfigError when there is none, or a file is missing or of an unknown format."""
    first = next(rows(path, key=key), None)
    if first is None:
        raise ConfigError(f"{key}: {path} holds no text and no record; set files that have some")
    return first
