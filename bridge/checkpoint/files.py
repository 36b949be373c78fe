"""The directories of a run's checkpoints: whole or not there, whenever the process dies.

    ROOT/.saving_iter_0000100/   being written; removed by the next save if the process died
    ROOT/iter_0000100/           whole: renamed into place, after its files were flushed to disk
    ROOT/latest_checkpointed_iteration.txt   "100": replaced by rename, after that
Old iterations are removed last.
"""

import os
import shutil
from pathlib import Path

from bridge.weights.locate import LATEST, CheckpointPath, locate

SAVING, REMOVING = ".saving_", ".removing_"


def latest(root: Path) -> CheckpointPath | None:
    """The newest complete checkpoint below `root`, or None before the first save."""
    return locate(root, key="checkpoint") if (root / LATEST).is_file() else None


def publish(unfinished: Path, final: Path) -> None:
    """Flush `unfinished` to disk, give it its name, then point `latest` at it: in this order, each step atomic."""
    for file in unfinished.iterdir():
        _flush(file)
    _flush(unfinished)
    if final.exists():  # whole, but its save was killed before `latest` was moved
        _remove(final)
    unfinished.rename(final)
    pointer = final.parent / f"{SAVING}latest"
    pointer.write_text(str(int(final.name.removeprefix("iter_"))))
    _flush(pointer)
    pointer.replace(final.parent / LATEST)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retain(newest: Path, *, keep: int) -> None:
    """Remove all but the `keep` last iterations up to `newest`."""
    # A later iteration can lie beside `newest` when a save was killed before `latest` moved: it is not counted.
    saved = sorted(directory for directory in newest.parent.glob("iter_*") if directory.name <= newest.name)
    for directory in saved[:-keep]:
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
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
