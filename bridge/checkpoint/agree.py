"""A step that all ranks take together: where it fails on one it fails on all, and none waits for one that is gone."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.distributed.checkpoint import CheckpointException

from bridge import parallel, platform
from bridge.errors import RunError
from bridge.weights.dist_files import system_reason
from bridge.weights.output import FULL

T = TypeVar("T")
FAILURES = (Exception, CheckpointException)  # torch derives the latter from BaseException


def together(step: Callable[[], T]) -> T:
    """`step()` on every rank. Raises its own error where it failed, and on the other ranks that error's class if they
    can make one of its text (errors of the user's), else RunError. A collective: every rank calls it."""
    value: T | None = None
    error: BaseException | None = None
    try:
        value = step()
    except FAILURES as raised:
        error = raised
    failures = parallel.all_gather(error and (type(error), reason(error)))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind, text = failure
            raise kind(text) if kind.__module__ == RunError.__module__ else RunError(f"rank {rank}: {text}")
    return value  # type: ignore[return-value]


def on_main(step: Callable[[], object]) -> None:
    """`step()` on rank 0 while the others wait; its failure is raised on all."""
    together(lambda: step() if parallel.is_main() else None)


def any_rank(holds: bool) -> bool:
    """Whether something `holds` on any rank: the same answer on all. A collective."""
    flag = torch.tensor([holds], dtype=torch.int32, device=platform.device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def reason(error: BaseException) -> str:
    """Why `error` happened, in one line: what the system said, if it was the system that refused."""
    if isinstance(error, CheckpointException) and error.failures:
        return reason(next(iter(error.failures.values()))[0])
    text = " ".join(str(error).split()).removeprefix("Worker failure: ")  # megatron-core's words
    if isinstance(error, OSError) and error.filename is not None and error.errno not in FULL:
        return f"{error.filename}: {error.strerror}"
    return system_reason(error) or text or type(error).__name__
