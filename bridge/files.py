"""Text files: written by rename, so that a reader sees the old one or the whole new one; YAML, or why not."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from bridge.errors import ConfigError


def write_text(text: str, path: Path) -> None:
    """Write `path` atomically. Raises OSError."""
    write_parts([text], path)


def write_parts(parts: Iterable[str], path: Path) -> None:
    """Write `path` atomically, one part after the other: no more is in memory. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: object, path: Path) -> None:
    """Write `path` atomically. Raises OSError."""
    write_text(json.dumps(content, indent=1) + "\n", path)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, plain values only. Raises ConfigError naming the file when it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:  # among them tags that would make Python objects
        raise ConfigError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
