"""What a run was started with besides its configuration: command line, host, devices, versions and git commits.

RUN_DIR/environment.jsonl has one line per start: the code under a run may change between two of them.
"""

import importlib.metadata
import json
import os
import platform as interpreter
import subprocess
import time
from pathlib import Path
from typing import Any

import bridge
from bridge import parallel, platform

ENVIRONMENT = "environment.jsonl"
COMMAND = "BRIDGE_COMMAND"  # environment variable: the command line as the driver got it, quoted for a shell
PACKAGES = ("bridge", "torch", "megatron-core", "transformers", "transformer-engine", "numpy", "hydra-core")
GIT_SECONDS = 10.0  # on a slow file system git may need long to see whether files have changed


def describe(*, step: int) -> dict[str, Any]:
    """Plain values. step: the one that this start goes on from. Process groups exist, this is the main process."""
    checkout = Path(bridge.__file__).resolve().parents[1]
    return {
        "step": step,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": os.environ.get(COMMAND),
        "directory": os.getcwd(),
        "host": os.uname().nodename,
        "processes": parallel.size(),
        "device": platform.device_name(),
        "python": interpreter.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        # An installed package lies in nobody's repository, or by chance in the user's.
        "bridge_commit": _commit(checkout) if (checkout / ".git").exists() else None,
        "directory_commit": _commit(Path.cwd()),
    }


def record(described: dict[str, Any], run_dir: Path) -> None:
    """Add a line to RUN_DIR/environment.jsonl."""
    with (run_dir / ENVIRONMENT).open("a", encoding="utf-8") as file:
        file.write(json.dumps(described) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(directory: Path) -> str | None:
    """The commit that `directory` stands at, with `-dirty` when tracked files differ; None outside a repository."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
