"""Child processes: they find the package, and do not outlive their parent.

The child binds itself, as the first thing it does: what a parent that has threads runs between fork and exec
(`preexec_fn`) can hang in a lock that another of its threads held.
"""

import ctypes
import gc
import os
import signal
import site
import sys
from collections.abc import Mapping
from pathlib import Path

import bridge

PARENT = "BRIDGE_PARENT"  # environment: the process id of the parent that a child is not to outlive
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def of_child(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a child of this process that calls `die_with_parent`."""
    return {**environment, PARENT: str(os.getpid())}


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent ends, however that happens.

    The parent's process id is what it gave by `of_child`, else `parent`. Where it is known and that process has ended
    already, this one ends now, without a word.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    told = os.environ.pop(PARENT, None)  # not for children of this process
    parent = parent if told is None else int(told)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def skip_last_collection() -> None:
    """Called where a process ends: it need not look for garbage among all that was imported, 0.6 s with torch.

    With torch's compiler it does: the compiler's lock files have destructors, which fail once modules are gone.
    """
    if "torch._inductor" not in sys.modules:
        gc.freeze()


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
