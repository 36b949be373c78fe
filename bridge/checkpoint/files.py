"""The directories of a run's checkpoints: whole or not there, whenever the process dies.

    ROOT/.saving_iter_0000100/   being written; removed by the next save if the process died
    ROOT/iter_0000100/           whole: renamed into place, after its files were flushed to disk
    ROOT/latest_checkpointed_iteration.txt   "100": replaced by rename, after that
    ROOT/best                    a link to the iteration with the best evaluation (checkpoint.keep_best)
Old iterations are removed last.
"""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from bridge.weights import pointer
from bridge.weights.locate import locate, root_of
from bridge.weights.pointer import BEST, LATEST

SAVING, REMOVING = ".saving_", ".removing_"


def iterations(path: Path) -> list[Path]:
    """The iteration directories of a run or checkpoints directory, or `path`, which is one itself.

    Raises ConfigError, naming `path`, when it is none of these.
    """
    root = root_of(path)
    if root is not None:
        found = {directory for directory in root.glob("iter_*") if directory.is_dir()}
        latest = pointer.read(root)
        return sorted(found if latest is None else {*found, latest})
    if re.fullmatch(r"iter_\d+", path.name) and path.is_dir():
        return [path]
    return [locate(path, key="path").directory]


def publish(unfinished: Path, final: Path, *, flushed: Collection[str] = ()) -> None:
    """Flush `unfinished` to disk, give it its name, then point `latest` at it: in this order, each step atomic.

    flushed: names of files that are on disk already.
    """
    for file in unfinished.iterdir():
        if file.name not in flushed:
            flush(file)
    flush(unfinished)
    if final.exists():  # whole, but its save was killed before `latest` was moved; or damaged, and fallen back from
        _remove(final)
    unfinished.rename(final)
    point_at(final)


def point_at(iteration: Path) -> None:
    """Make a directory the latest checkpoint beside it; a kill leaves the earlier one the latest, or this."""
    unfinished = iteration.with_name(f"{SAVING}latest")
    unfinished.write_text(str(pointer.iteration_of(iteration)))
    flush(unfinished)
    unfinished.replace(iteration.with_name(LATEST))
    flush(iteration.parent)


def point_best_at(iteration: Path) -> None:
    """Make ROOT/best a link to a directory beside it; a kill leaves the earlier link, or this."""
    unfinished = iteration.with_name(f"{SAVING}{BEST}")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(iteration.name)
    unfinished.replace(iteration.with_name(BEST))
    flush(iteration.parent)


def best(root: Path) -> Path | None:
    """What ROOT/best links to; None without one."""
    link = root / BEST
    return root / os.readlink(link) if link.is_symlink() else None


def flush(path: Path) -> None:
    """Have what is written of a file, or of a directory's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retain(newest: Path, *, keep: int, spare: Collection[str] = ()) -> None:
    """Remove all but the `keep` last iterations up to `newest`, the best one, and those whose name is in `spare`."""
    # A later iteration can lie beside `newest` when a save was killed before `latest` moved: it is not counted.
    saved = sorted(directory for directory in newest.parent.glob("iter_*") if directory.name <= newest.name)
    kept = best(newest.parent)
    for directory in saved[:-keep]:
        if directory.name not in spare and directory != kept:
            _remove(directory)


def _remove(directory: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a kill leaves no half of one under it."""
    nameless = directory.with_name(f"{REMOVING}{directory.name}")
    directory.rename(nameless)
    shutil.rmtree(nameless)


def remove_leftovers(root: Path) -> None:
    """Remove what a save or a removal that was killed has left below `root`."""
    for prefix in (SAVING, REMOVING):
        for leftover in root.glob(f"{prefix}*"):
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
