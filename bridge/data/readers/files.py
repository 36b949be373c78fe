"""What data.path names: files of this machine or of a store that fsspec reaches, folders and globs of them."""

import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from bridge.errors import ConfigError, did_you_mean

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".json": "json_values",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")
SAVED_DATASET = "state.json"  # in a directory that datasets.Dataset.save_to_disk wrote
SAVED_SPLITS = "dataset_dict.json"  # in one that holds several of them
READ = 1 << 20  # bytes read at a time
NEEDS_PYARROW = (".parquet", ".zst")


class Malformed(Exception):
    """What is wrong at a line of a file; `rows` tells the user."""

    def __init__(self, line: int, fault: str) -> None:
        super().__init__(fault)
        self.line = line


class File(NamedTuple):
    """A file, or a directory of Hugging Face datasets. version: another one once it was written again."""

    name: str
    size: int
    version: str

    @property
    def format(self) -> str:
        """Which module here reads it."""
        return FORMATS.get(suffixes(self.name)[0], "saved_dataset")


class Named(NamedTuple):
    """What one path names, in a fixed order. limit: how many rows are wanted of all of them; None: all."""

    files: list[File]
    limit: int | None


def suffixes(name: str) -> tuple[str, str]:
    """The format's and the compression's suffix of a file name; either may be empty."""
    path = PurePosixPath(name.lower())
    packed = path.suffix if path.suffix in COMPRESSED else ""
    return PurePosixPath(path.stem).suffix if packed else path.suffix, packed


def resolved(path: str | Sequence[str], *, key: str) -> list[Named]:
    """The files behind `path`: paths, globs, folders and URLs, each perhaps followed by :N. Raises ConfigError."""
    paths = [path] if isinstance(path, str) else list(path)
    if not paths or not all(isinstance(item, str) and item for item in paths):
        raise ConfigError(f"{key}: {path!r} names no file; set a path or a list of paths")
    return [_named(item, key=key) for item in paths]


def identity(path: str | Sequence[str], *, key: str) -> str:
    """Changes when a file of `path` is added, removed, renamed or written again. Reads no file.

    64 hexadecimal digits.
    """
    found = [(named.limit, [list(file) for file in named.files]) for named in resolved(path, key=key)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def size(path: str | Sequence[str], *, key: str) -> int:
    """Bytes of all files of `path`, as they are stored."""
    return sum(file.size for named in resolved(path, key=key) for file in named.files)


def _named(path: str, *, key: str) -> Named:
    name, limit = path, None
    rows = re.fullmatch(r"(.+):(\d+)", path)
    if rows is not None and not os.path.exists(path):
        name, limit = rows[1], int(rows[2])
    files = _in_store(name, key=key) if "://" in name else _here(name, key=key)
    for file in files:
        _check_format(file, key=key)
    return Named(files, limit)


def _here(name: str, *, key: str) -> list[File]:
    path = os.path.abspath(os.path.expanduser(name))
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, SAVED_DATASET)):
            return [_local(path)]
        _refuse_splits(path, os.path.exists(os.path.join(path, SAVED_SPLITS)), key=key)
        return _readable(sorted(_below(path)), name=path, key=key)
    if os.path.exists(path):
        return [_local(path)]
    if not glob.has_magic(path):
        folder = os.path.dirname(path)
        beside = os.listdir(folder) if os.path.isdir(folder) else []
        hint = (
            did_you_mean(os.path.basename(path), beside) or "; set a file, a folder or a pattern such as 'DIR/*.jsonl'"
        )
        raise ConfigError(f"{key}: {path} does not exist{hint}")
    matches = (found for found in sorted(glob.glob(path, recursive=True)) if os.path.isfile(found))
    return _readable(matches, name=path, key=key, all_of_them=True)


def _below(path: str) -> Iterator[str]:
    for folder, folders, names in os.walk(path):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def _readable(paths: Any, *, name: str, key: str, all_of_them: bool = False) -> list[File]:
    files = [_local(path) for path in paths if all_of_them or suffixes(path)[0] in FORMATS]
    if not files:
        raise ConfigError(f"{key}: {name} has no file to read; known: {_known()}")
    return files


def _local(path: str) -> File:
    if os.path.isdir(path):
        arrow = sum(os.path.getsize(found) for found in glob.glob(os.path.join(glob.escape(path), "*.arrow")))
        return File(path, arrow, str(os.stat(os.path.join(path, SAVED_DATASET)).st_mtime_ns))
    stat = os.stat(path)
    return File(path, stat.st_size, str(stat.st_mtime_ns))


def _refuse_splits(name: str, has_them: bool, *, key: str) -> None:
    if has_them:
        raise ConfigError(f"{key}: {name} holds several data sets ({SAVED_SPLITS}); name one of its directories")


def _in_store(url: str, *, key: str) -> list[File]:
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(url)
        if store.isdir(path):
            _refuse_splits(url, store.exists(f"{path}/{SAVED_SPLITS}"), key=key)
            inside = [found for found in sorted(store.find(path)) if suffixes(found)[0] in FORMATS]
            found = [name for name in inside if not fnmatch.fnmatch(name, "*/.*")]
        else:
            found = sorted(store.glob(path)) if glob.has_magic(path) else [path]
        return [_stored(store, name) for name in found] or _readable([], name=url, key=key)
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {url} does not exist; set a file, a folder or a pattern") from error
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"{key}: {url} cannot be reached ({' '.join(str(error).split())})") from error


def _stored(store: Any, name: str) -> File:
    return File(store.unstrip_protocol(name), int(store.size(name) or 0), str(store.ukey(name)))


def _check_format(file: File, *, key: str) -> None:
    suffix, packed = suffixes(file.name)
    saved = file.format == "saved_dataset"
    if saved and not os.path.isdir(file.name):
        raise ConfigError(f"{key}: {file.name} is of no format that is known here; known: {_known()}")
    if (saved or suffix in NEEDS_PYARROW or packed in NEEDS_PYARROW) and find_spec("pyarrow") is None:
        raise ConfigError(f"{key}: {file.name} needs a package that is missing; pip install pyarrow")


def _known() -> str:
    return f"{', '.join(FORMATS)}, also with {' or '.join(COMPRESSED)}, and what datasets' save_to_disk wrote"


class Meter:
    """Counts the bytes that are read of files, as they are stored."""

    def __init__(self) -> None:
        self.read = 0

    def share(self, size: int) -> float:
        """How much of `size` bytes that is, at most 1."""
        return min(1.0, self.read / max(1, size))


class _Counted(io.RawIOBase):
    def __init__(self, raw: Any, meter: Meter) -> None:
        self.raw, self.meter = raw, meter

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.raw.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.raw.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        count = self.raw.readinto(buffer)
        self.meter.read += count
        return int(count)


@contextmanager
def opened(file: File, meter: Meter) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked."""
    name = file.name
    with _raw(name) as stored, io.BufferedReader(_Counted(stored, meter), READ) as raw:
        packed = suffixes(name)[1]
        if packed == ".gz":
            with gzip.GzipFile(fileobj=raw) as plain:
                yield plain  # type: ignore[misc]
        elif packed == ".zst":
            import pyarrow

            with io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")) as plain:
                yield plain
        else:
            yield raw


def _raw(name: str) -> Any:
    if "://" not in name:
        return open(name, "rb", buffering=0)
    import fsspec

    return fsspec.open(name, "rb")
