"""An output directory that appears by rename: whole, or not at all."""

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bridge.errors import ConversionError
from bridge.weights.locate import is_hf
from bridge.weights.pointer import LATEST

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_directory(path: str | Path, *, overwrite: bool, key: str) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; it takes the name `path` when the block ends without an exception.

    An exception, Ctrl-C or SIGTERM leaves nothing behind and an old `path` untouched; what a killed process left is
    removed by the next one. Raises ConversionError when the disk is full, when `path` exists (an empty directory does
    not count) and `overwrite` is false, or is not a model directory and so is not ours to replace. `key` names the
    user's setting.
    """
    path = Path(path).expanduser().absolute()
    check_free(path, overwrite=overwrite, key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        with _sigterm_raises():
            yield partial
        _replace(path, partial)
    except OSError as error:  # tensors name their file; this is for all that is small
        if error.errno not in FULL:
            raise
        raise ConversionError(f"{key}: {path} cannot be written ({error.strerror}); free some space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_space(directory: Path, num_bytes: int) -> None:
    """Raise ConversionError when the disk of `directory` has no room for `num_bytes`, before any is written."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ConversionError(
            f"{directory}: the tensors take {num_bytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another path"
        )


def check_free(path: Path, *, overwrite: bool, key: str) -> None:
    """Raise ConversionError when `path` exists and may not be replaced: `overwrite` is false, or it is not a model."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise ConversionError(f"{key}: {path} exists; choose another path or set overwrite=true")
    if not is_hf(path) and not (path / LATEST).is_file():
        raise ConversionError(f"{key}: {path} is not a model directory, so overwrite=true does not replace it")


def _replace(path: Path, partial: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    partial.rename(path)
    shutil.rmtree(old)


def _remove_orphans(path: Path) -> None:
    for orphan in path.parent.glob(f".{path.name}.partial-*"):
        pid = orphan.name.rpartition("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(orphan, ignore_errors=True)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that `finally` blocks run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
