"""Which device this process computes on, and what it can tell. torch is imported by the functions, not here."""

import functools
import os
import re
import resource
import time
from importlib.util import find_spec
from pathlib import Path
from platform import machine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# One of them is there where torch finds a GPU: of NVIDIA's driver, of Windows' for its Linux, on Jetson, of AMD's.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")


def may_have_gpu() -> bool:
    """False on a machine without any GPU driver. Costs no torch."""
    return any(Path(driver).exists() for driver in DRIVERS)


def num_devices() -> int:
    """GPUs this process may use; 0 without an NVIDIA driver, and then no torch is imported (the driver calls this)."""
    if not Path("/dev/nvidiactl").exists():
        return 0
    import torch

    return torch.cuda.device_count()


@functools.cache
def on_cuda() -> bool:
    """True when a GPU can be used. Asked once: the redirections of `cpu.py` must not change the answer."""
    if not may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()


@functools.cache
def compute_capability() -> tuple[int, int]:
    """Of this process's GPU, (9, 0) on Hopper; (0, 0) without one."""
    if not on_cuda():
        return 0, 0
    import torch

    return torch.cuda.get_device_capability()


def device() -> "torch.device":
    """The device of this process: its GPU, or the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def device_name() -> str:
    """What `device()` is: the GPU's name, or the CPU's and how many cores this process may use."""
    if on_cuda():
        import torch

        return torch.cuda.get_device_name()
    try:
        models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        models = []
    return f"{models[0] if models else machine()}, {len(os.sched_getaffinity(0))} cores"


def backend() -> str:
    """The torch.distributed backend for this device."""
    return "nccl" if on_cuda() else "gloo"


def set_local_rank(local_rank: int) -> None:
    """Choose the GPU of this process by its rank on the host; nothing to choose on CPU.

    A process that sees one GPU has been given its own: `srun --gpus-per-task=1` hides the others.
    """
    if on_cuda():
        import torch

        torch.cuda.set_device(local_rank if torch.cuda.device_count() > 1 else 0)


@functools.cache
def has_transformer_engine() -> bool:
    """True when Transformer Engine's kernels can run: a GPU is there and the package imports."""
    if not on_cuda() or find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):  # OSError: the shared library does not load against this torch or driver
        return False
    return True


def synchronize() -> None:
    """Wait until all work queued on the device is done, so that a clock read next is honest."""
    if on_cuda():
        import torch

        torch.cuda.synchronize()


def mark() -> "float | torch.cuda.Event":
    """A point in the device's queue of work, for `seconds_between`. Costs no wait."""
    if not on_cuda():
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, last: Any) -> float:
    """Time the device took from one `mark` to a later one; both must have been reached (`synchronize`)."""
    return first.elapsed_time(last) / 1e3 if on_cuda() else last - first


def peak_memory_bytes() -> int:
    """Most bytes held so far: by the CUDA allocator, or on CPU by the whole process (ru_maxrss is in KiB on Linux)."""
    if on_cuda():
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
