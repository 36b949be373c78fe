"""The environment of worker processes."""

import os
import site
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bridge


def worker_environment(*, num_devices: int, fields: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the workers. What the user has set already stays."""
    defaults = {"OMP_NUM_THREADS": str(max(1, num_cores() // num_devices)), "PYTHONUNBUFFERED": "1"}
    if any((fields.get(size) or 1) > 1 for size in ("tensor_model_parallel_size", "context_parallel_size")):
        # With one hardware queue, kernels start in the order they were issued, which mcore's overlap of TP and CP
        # communication with computation relies on. It is read when a process first touches the GPU: set it before.
        defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    environment = defaults | dict(os.environ)
    return environment | {"PYTHONPATH": python_path()}


def python_path() -> str:
    """PYTHONPATH with which other processes find the package, too: `python DIR/train.py` finds it beside the script."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    checkout = str(Path(bridge.__file__).parents[1])
    if checkout not in (*paths, *site.getsitepackages()):
        paths.insert(0, checkout)
    return os.pathsep.join(paths)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
