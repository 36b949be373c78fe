"""The server that a trainer's loader processes are forked from: without threads, as a process that has must not fork.

It is multiprocessing's fork server, with the imports of `loader_imports`. This file imports no torch.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import context, forkserver, resource_tracker

from bridge.processes import python_path

# For the trainer to act on, and to be left to it where every process of a job gets them.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class _Process(context.ForkServerProcess):
    """A loader process. It does not hear SIGTERM."""

    def terminate(self) -> None:
        self.kill()


class Context(context.ForkServerContext):
    """multiprocessing's context for torch's DataLoader."""

    Process = _Process


def start() -> Context:
    """Start the server if none is running: it imports for seconds, so early is better. Its processes end with it, and
    it with the thread that called this first."""
    loader_context = Context()
    loader_context.set_forkserver_preload(["bridge.data.loader_imports"])
    warnings = os.environ.get("PYTHONWARNINGS")
    variables = {
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",  # else OpenBLAS starts threads when numpy is imported
        "OPENBLAS_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # multiprocessing's account of what a killed trainer left: its process cleans up after it.
        "PYTHONWARNINGS": ",".join(filter(None, [warnings, "ignore:resource_tracker"])),
    }
    with _environment(variables):
        resource_tracker.ensure_running()  # it unblocks signals, so first
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # new processes inherit what is blocked
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return loader_context


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """os.environ with `variables`, as it was afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
