"""In the process that starts others: what subprocess and multiprocessing would fork and exec is asked of the twin."""

import _posixsubprocess
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_OPTIONS = (["-u"], ["-B"], ["-W", "ignore"])  # of Python, those that tests/warm/twin.py understands

_fork_exec = _posixsubprocess.fork_exec
_lock = threading.Lock()
_twin: socket.socket | None = None


class Order(NamedTuple):
    """A process to start. The file descriptors numbered `descriptors` come with it."""

    command: list[str]
    environment: dict[str, str]
    directory: str
    descriptors: list[int]
    new_session: bool
    blocked: list[int]  # signals, as those below
    ignored: list[int]
    cores: list[int]


def on() -> None:
    """Start warm processes from now on. The server is started at first use and ends with this process."""
    _posixsubprocess.fork_exec = subprocess._fork_exec = _start  # type: ignore[attr-defined]


def off() -> None:
    """Start real processes from now on."""
    _posixsubprocess.fork_exec = subprocess._fork_exec = _fork_exec  # type: ignore[attr-defined]


@contextmanager
def real() -> Iterator[None]:
    """Start real processes inside, warm ones afterwards."""
    off()
    try:
        yield
    finally:
        on()


os.register_at_fork(after_in_child=off)  # a twin gives its processes to the one it belongs to, not to a fork of that


def belong_to(twin: socket.socket) -> None:
    """Start processes by that twin."""
    global _twin
    _twin = twin
    on()


def _start(*call: Any) -> int:
    """In place of `_posixsubprocess.fork_exec`: the process id of the new process."""
    (arguments, executables, _, kept, directory, environment, stdin, _, _, stdout, _, stderr, _, for_errors) = call[:14]
    restore_signals, new_session, *others = call[14:]
    command = [os.fsdecode(argument) for argument in arguments]
    as_usual = all(other is None or other == -1 for other in others[:6])  # no other user, umask or preexec_fn
    if not as_usual or os.fsencode(sys.executable) not in map(os.fsencode, executables) or not _is_known(command):
        return _fork_exec(*call)
    ignored = [signum for signum in signal.valid_signals() if signal.getsignal(signum) == signal.SIG_IGN]
    standard = [given if given != -1 else number for number, given in enumerate((stdin, stdout, stderr))]
    passed = [number for number in kept if number > 2 and number != for_errors]
    order = Order(
        command,
        dict(os.environ) if environment is None else _parsed(environment),
        os.getcwd() if directory is None else os.path.abspath(os.fsdecode(directory)),
        [0, 1, 2, *passed],
        bool(new_session),
        [*signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        [number for number in ignored if not (restore_signals and number == signal.SIGPIPE)],
        [*os.sched_getaffinity(0)],
    )
    return _ask(order, [*standard, *passed])


def _server() -> socket.socket:
    """The first twin, a real process that is started here."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The last argument makes room for the command lines that its forks show.
    command = [sys.executable, "-m", "tests.warm.server", str(theirs.fileno()), "_" * 16384]
    with theirs, real():
        subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
    return ours


def _is_known(command: Sequence[str]) -> bool:
    _, words = split(command)
    return len(words) > 0 and (words[0] in ("-m", "-c") or not words[0].startswith("-"))


def split(command: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """(options of Python, what it runs and the arguments of that)."""
    options, words = [], list(command[1:])
    while found := [option for option in _OPTIONS if words[: len(option)] == option]:
        options += found
        del words[: len(found[0])]
    return options, words


def _parsed(environment: Sequence[bytes]) -> dict[str, str]:
    pairs = (os.fsdecode(entry).partition("=") for entry in environment)
    return {name: value for name, _, value in pairs}


def _ask(order: Order, descriptors: list[int]) -> int:
    """The process id of the new process, a child of this one."""
    global _twin
    prctl = ctypes.CDLL(None).prctl
    with _lock:
        _twin = twin = _twin or _server()
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            # A message has a limit: the order goes as a file.
            with os.fdopen(os.memfd_create("order"), "w+b") as file:
                file.write(json.dumps(order).encode())
                file.flush()
                socket.send_fds(twin, [b"start"], [file.fileno(), *descriptors])
            answer = twin.recv(64)
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert answer, f"no answer to {order.command}: the twin has ended"
    return int(answer)
