"""How much memory there is for a run on this machine, and what its end looks like. Costs no torch without a GPU."""

import os
from pathlib import Path

import psutil

from bridge.platform.devices import on_cuda

# Of the control group that a container or a Slurm job runs in, v2 and v1.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def gpu_memory_bytes() -> int | None:
    """Memory of this process's GPU, which LOCAL_RANK names; None without one."""
    if not on_cuda():
        return None
    import torch

    index = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0
    return int(torch.cuda.get_device_properties(index).total_memory)


def machine_memory_bytes() -> int:
    """Memory and swap space that all processes of this machine, or of this process's control group, share."""
    whole = psutil.virtual_memory().total + psutil.swap_memory().total
    limits = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's CPU allocator or CUDA found no memory."""
    said = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or said
