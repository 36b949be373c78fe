"""`python -m bridge.checkpoint verify PATH`: is every file of a run's checkpoints what was saved, and harmless?"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bridge.checkpoint import checksums
from bridge.errors import BridgeError, ConfigError
from bridge.weights import locate
from bridge.weights.dist_files import open_dist
from bridge.weights.plain_objects import check_plain
from bridge.weights.progress import Progress


def verify(iterations: Sequence[Path]) -> int:
    """Compare iteration directories with their checksums; a line per iteration or fault.

    The exit code: 0 all is well, 1 something is damaged or would run code.
    """
    good = [_verify(directory) for directory in iterations]
    return 0 if all(good) else 1


def _verify(directory: Path) -> bool:
    try:
        faults, summary = _faults(directory)
    except ConfigError as error:
        faults, summary = [str(error).removeprefix("path: ")], ""
    for fault in faults:
        print(fault, flush=True)
    if not faults:
        print(f"{directory}: {summary}", flush=True)
    return not faults


def _faults(directory: Path) -> tuple[list[str], str]:
    locate.locate(directory, key="path")
    try:
        recorded = checksums.read(directory)
        if not recorded:
            num_tensors = _read_all(directory)
            check_plain(directory)
            return [], f"no checksums were recorded; all {num_tensors} tensors can be read"
        faults = checksums.size_faults(directory, recorded)
        num_bytes = sum(file.bytes for file in recorded.values())
        if not faults:
            progress = Progress("verify", num_tensors=len(recorded), num_bytes=num_bytes, unit="files")
            faults = checksums.content_faults(directory, recorded, advance=partial(_advance, progress, set()))
        if not faults:
            check_plain(directory)
        return faults, f"{len(recorded)} files, {num_bytes / 1e6:.1f} MB, as they were saved"
    except BridgeError as error:
        return [str(error)], ""


def _advance(progress: Progress, begun: set[str], name: str, num_bytes: int) -> None:
    progress.add(num_bytes, name=name, count=name not in begun)
    begun.add(name)


def _read_all(directory: Path) -> int:
    dist = open_dist(directory)
    num_bytes = sum(stored.spec.num_bytes for stored in dist.tensors.values())
    progress = Progress("verify", num_tensors=len(dist.tensors), num_bytes=num_bytes)
    for key, stored in dist.tensors.items():
        dist.read(key)
        progress.add(stored.spec.num_bytes, name=key)
    return len(dist.tensors)
