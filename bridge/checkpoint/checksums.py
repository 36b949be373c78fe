"""checksums.json of an iteration: size and CRC-32 of every file, recorded when it was saved.

CRC-32 finds every error burst of up to 32 bits and misses one random change in 4e9; it protects from disks and copies,
not from people. It is chosen for its speed: zlib does 4.0 GB/s on one core here, SHA-256 1.4, BLAKE2b 0.8, and the
writers compute it while the trainer goes on or waits.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bridge.errors import DamagedError

CHECKSUMS = "checksums.json"
ALGORITHM = "crc32"
BLOCK = 1 << 22  # bytes read at once


class Checksum(NamedTuple):
    """Size in bytes and CRC-32, as eight hexadecimal digits."""

    bytes: int
    crc32: str


def of_file(path: Path, *, advance: Callable[[int], None] = lambda _: None) -> Checksum:
    """Read `path` once; `advance` is told the bytes of each block."""
    size, value = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            size += len(block)
            value = zlib.crc32(block, value)
            advance(len(block))
    return Checksum(size, f"{value:08x}")


def write(directory: Path, files: Mapping[str, Checksum]) -> None:
    """Record the checksums of files in `directory`, by name."""
    content = {"algorithm": ALGORITHM, "files": {name: value._asdict() for name, value in sorted(files.items())}}
    (directory / CHECKSUMS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(directory: Path) -> dict[str, Checksum]:
    """The recorded checksums, by file name; empty when none were recorded (a checkpoint by other scripts).

    Raises DamagedError.
    """
    file = directory / CHECKSUMS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: Checksum(value["bytes"], value["crc32"]) for name, value in content["files"].items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{file}: is damaged ({' '.join(str(error).split())})") from error


def size_faults(directory: Path, recorded: Mapping[str, Checksum]) -> list[str]:
    """One line for every recorded file that is missing or has another size; reads no file."""
    faults = []
    for name, expected in recorded.items():
        file = directory / name
        try:
            size = file.stat().st_size
        except OSError as error:
            faults.append(f"{file}: cannot be read ({error.strerror})")
            continue
        if size != expected.bytes:
            faults.append(f"{file}: has {size} bytes, but {expected.bytes} were saved; it is damaged")
    return faults


def content_faults(
    directory: Path, recorded: Mapping[str, Checksum], *, advance: Callable[[str, int], None] = lambda *_: None
) -> list[str]:
    """One line for every recorded file whose content is another or cannot be read; reads all of them.

    advance: told the file's name and the bytes of each block.
    """
    faults = []
    for name, expected in recorded.items():
        file = directory / name
        try:
            found = of_file(file, advance=partial(advance, name))
        except OSError as error:
            faults.append(f"{file}: cannot be read ({error.strerror})")
            continue
        if found.crc32 != expected.crc32:
            faults.append(f"{file}: CRC-32 is {found.crc32}, but {expected.crc32} was saved; it is damaged")
    return faults
