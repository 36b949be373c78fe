"""A process and all that it has started, directly or not."""

import signal
from contextlib import suppress

import psutil


def tree(pid: int | None) -> list[psutil.Process]:
    """The process and all its descendants, itself first; empty when it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_below(pid: int) -> None:
    """Kill all that a process has started, not the process itself."""
    for process in tree(pid)[1:]:
        send(process, signal.SIGKILL)


def kill_tree(pid: int | None) -> None:
    """Kill a process and all that it has started."""
    for process in tree(pid):
        send(process, signal.SIGKILL)


def runs(process: psutil.Process, *modules: str) -> bool:
    """Whether it is a Python that was started with `-m` and one of these modules."""
    try:
        command = process.cmdline()
    except psutil.Error:  # it has just ended
        return False
    return any(["-m", module] in (command[1:3], command[2:4]) for module in modules)  # or `python -u -m ...`


def send(process: psutil.Process, signum: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signum)
