"""Resuming: the latest checkpoint of a run, found whole and harmless, loaded; or, if allowed, the newest that is."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bridge import parallel
from bridge.checkpoint import checksums, files, loading
from bridge.checkpoint.agree import FAILURES, on_main, together
from bridge.checkpoint.content import Position, Trainable
from bridge.config.schema import Checkpoint
from bridge.errors import BridgeError, ConfigError, DamagedError
from bridge.weights import common_state, locate, pointer
from bridge.weights.dist_files import open_dist
from bridge.weights.locate import CheckpointPath
from bridge.weights.plain_objects import check_plain
from bridge.weights.pointer import LATEST


class Resumed(NamedTuple):
    """Where a run goes on."""

    path: CheckpointPath
    progress: Position


def has_checkpoint(root: Path) -> bool:
    """Whether a run has saved below `root`, even a damaged checkpoint."""
    return (root / LATEST).is_file()


def stands_at(root: Path) -> Position:
    """Where the latest checkpoint below `root` stands, told without loading it; 0 for one that cannot be read."""
    try:
        latest = pointer.read(root)
        progress = None if latest is None else common_state.read(latest).get("progress")
    except BridgeError:
        return Position()
    return Position(**progress) if isinstance(progress, dict) else Position()


def resume(root: Path, state: Trainable, options: Checkpoint, *, reseed: Callable[[int], None]) -> Resumed:
    """Restore `state` from the latest checkpoint below `root`. All ranks call this.

    reseed: called with the iteration before it is loaded; in another layout generators cannot be continued, and seeds
    of their own keep them from repeating the first steps.

    Raises DamagedError naming the file when a file is damaged, unless options.fall_back lets the next older checkpoint
    be tried, which is printed and makes that one the latest; ConversionError when loading a file could run code.
    """
    candidates = _candidates(root)
    for path, older in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            found = together(lambda path=path: _found(path))  # type: ignore[misc]
            _check(found.directory, verify=options.verify)
            reseed(found.iteration)
            progress = _loaded(found, state)
        except DamagedError as error:
            if older is None:
                raise
            if not options.fall_back:
                hint = f"checkpoint.fall_back=true resumes from {older.name} instead"
                raise DamagedError(f"{error}; {hint}") from error
            if parallel.is_main():
                print(f"checkpoint.fall_back: {error}; falling back to {older.name}", flush=True)
        else:
            if path != candidates[0]:  # which may be written anew: until then, `latest` must name a whole one
                on_main(partial(files.point_at, path))
            return Resumed(found, progress)
    raise AssertionError("a root with `latest` has a candidate")


def _candidates(root: Path) -> list[Path]:
    """The iteration that `latest` names, then the older ones, newest first."""
    newest = pointer.read(root)
    assert newest is not None
    older = [path for path in root.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name) and path.name < newest.name]
    return [newest, *sorted(older, reverse=True)]


def _found(path: Path) -> CheckpointPath:
    try:
        return locate.locate(path, key="checkpoint")
    except ConfigError as error:
        raise DamagedError(str(error)) from error


def _check(directory: Path, *, verify: bool) -> None:
    """Sizes always, contents if asked; then the objects that loading would unpickle. The ranks share the reading."""
    rank, world_size = parallel.rank(), parallel.size()

    def sound() -> None:
        recorded = checksums.read(directory)
        faults = checksums.size_faults(directory, recorded)
        if verify and not recorded:
            raise ConfigError(
                f"checkpoint.verify: {directory} has no {checksums.CHECKSUMS} to compare with; leave it out"
            )
        if verify and not faults:
            share = dict(sorted(recorded.items())[rank::world_size])
            faults = checksums.content_faults(directory, share)
        if faults:
            raise DamagedError(faults[0])
        check_plain(directory, share=(rank, world_size))

    together(sound)


def _loaded(path: CheckpointPath, state: Trainable) -> Position:
    try:
        return loading.load(path, state)
    except BridgeError:
        raise
    except FAILURES as error:
        mine = damage(path.directory, share=(parallel.rank(), parallel.size()))
        fault = next(filter(None, parallel.all_gather(mine)), None)
        if fault is None:
            raise
        raise DamagedError(fault) from error


def damage(directory: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """The first damaged file of an iteration, in a line, or None: by its checksums, or where there are none by reading
    every tensor. Reads everything, or the `share` (n, of) of it."""
    first, step = share
    try:
        recorded = checksums.read(directory)
        if recorded:
            faults = checksums.content_faults(directory, dict(sorted(recorded.items())[first::step]))
            return faults[0] if faults else None
        dist = open_dist(directory)
        for key in sorted(dist.tensors)[first::step]:
            dist.read(key)
    except (BridgeError, OSError) as error:
        return str(error)
    return None
