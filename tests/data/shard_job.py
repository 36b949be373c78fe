"""A job for processes that encode, which does what its items say: for tests of how they are given work."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bridge.data.encode.sharding import Made, Work
from bridge.errors import ConfigError


class Do(NamedTuple):
    unit: str = "items"

    def is_whole(self, prefix: str) -> bool:
        return Path(prefix).exists()

    def start(self) -> Work:
        return do


def do(prefix: str, items: Sequence[str]) -> Made:
    """`refuse`, `full` and `late` say what happens; any other item is written."""
    for item in items:
        if item == "late":
            time.sleep(0.3)
        elif item == "full":
            raise OSError(28, "No space left on device")
        elif item.startswith("refuse"):
            raise ConfigError(f"data.path: {item}")
    Path(prefix).write_text("".join(items))
    return Made(len(items), sum(map(len, items)))
