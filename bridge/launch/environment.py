"""The environment of worker processes."""

import os
from collections.abc import Mapping
from typing import Any

from bridge.processes import num_cores, python_path


def worker_environment(*, num_devices: int, fields: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the workers. What the user has set already stays."""
    defaults = {"OMP_NUM_THREADS": str(max(1, num_cores() // num_devices)), "PYTHONUNBUFFERED": "1"}
    if any((fields.get(size) or 1) > 1 for size in ("tensor_model_parallel_size", "context_parallel_size")):
        # With one hardware queue, kernels start in the order they were issued, which mcore's overlap of TP and CP
        # communication with computation relies on. It is read when a process first touches the GPU: set it before.
        defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    environment = defaults | dict(os.environ)
    return environment | {"PYTHONPATH": python_path()}
