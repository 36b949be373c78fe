"""The twin: starts processes for the process it belongs to, forks of itself that then run a Python command."""

import ctypes
import gc
import importlib
import io
import json
import multiprocessing.process
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
import warnings
from contextlib import suppress
from typing import NoReturn

from tests.warm import start
from tests.warm.start import Order

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_path: list[str] = []  # sys.path without what comes from a command or from PYTHONPATH


def remember_start() -> None:
    """In the server: what a process has before it runs a command."""
    ours = {os.getcwd(), "", *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    _path[:] = [path for path in sys.path if path not in ours]


def serve(channel: socket.socket) -> tuple[Order, list[int]]:
    """Start what is asked for until nobody asks any more, then end. Returns in the new processes only."""
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        message, descriptors, _, _ = socket.recv_fds(channel, 64, 250)
        if not message:
            os._exit(0)
        with os.fdopen(descriptors[0], "rb") as file:
            file.seek(0)
            order = Order(*json.load(file))
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            us = os.getpid()
            new = os.fork()
            if new == 0:
                while os.getppid() == us:  # until Linux has given this process to the one that asked
                    signal.sigtimedwait([], 0.0005)
                os.close(read)
                os.close(write)
                channel.close()
                return order, descriptors[1:]
            os.write(write, str(new).encode())
            os._exit(0)
        os.waitpid(between, 0)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        channel.send(os.read(read, 64))
        os.close(read)
        os.close(write)


def become(order: Order, descriptors: list[int]) -> NoReturn:
    """In a new process: be the one that `order` asks for, and its twin another one."""
    _take(order, descriptors)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        ours.close()
        _show([sys.executable, "(twin)"])
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)  # meant for the other processes of the group
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in order.descriptors:  # a pipe's reader waits for all that hold its other end
            os.dup2(quiet, number) if number < 3 else os.close(number)
        become(*serve(theirs))
    theirs.close()
    start.belong_to(ours)
    _leave(_run(order.command))


def _take(order: Order, descriptors: list[int]) -> None:
    """What a real process would have got by fork and exec."""
    high = [_above(descriptor, 512) for descriptor in descriptors]
    os.closerange(0, 512)
    for descriptor, number in zip(high, order.descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for signum in signal.valid_signals():
        with suppress(OSError, ValueError):
            signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in order.ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, order.blocked)
    if order.new_session:
        os.setsid()
    os.sched_setaffinity(0, order.cores)
    os.chdir(order.directory)
    os.environ.clear()
    os.environ.update(order.environment)
    options, _ = start.split(order.command)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED")) or ["-u"] in options
    sys.dont_write_bytecode = ["-B"] in options or bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    if ["-W", "ignore"] in options:
        warnings.simplefilter("ignore")
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _stream(1, errors="strict", unbuffered=unbuffered)
    sys.stderr = sys.__stderr__ = _stream(2, errors="backslashreplace", unbuffered=unbuffered)
    importlib.invalidate_caches()
    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = order.directory  # type: ignore[attr-defined]
    _show(order.command)


def _above(descriptor: int, number: int) -> int:
    """A copy of the descriptor with a number from `number` up; the original is closed."""
    import fcntl

    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, number)
    os.close(descriptor)
    return copy


def _stream(descriptor: int, *, errors: str, unbuffered: bool) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "w", closefd=False)
    lines = raw.isatty() or descriptor == 2
    return io.TextIOWrapper(
        io.BufferedWriter(raw), errors=errors, line_buffering=lines and not unbuffered, write_through=unbuffered
    )


def _show(command: list[str]) -> None:
    """Make `command` the command line of this process in /proc."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, fields 48 and 49 in proc(5)
    text = b"\0".join(map(os.fsencode, command))[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _run(command: list[str]) -> int:
    """Run Python's command line; the exit code."""
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    _, (first, *words) = start.split(command)
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    sys.orig_argv = command
    try:
        if first == "-m":
            sys.path[:] = [os.getcwd(), *before, *_path]
            sys.argv = ["-m", *words[1:]]
            sys.modules.pop(words[0], None)  # run, not imported, as it is in a real process
            runpy._run_module_as_main(words[0])  # type: ignore[attr-defined]
        elif first == "-c":
            sys.path[:] = ["", *before, *_path]
            sys.argv = ["-c", *words[1:]]
            exec(compile(words[0], "<string>", "exec"), main.__dict__)
        else:
            sys.path[:] = [os.path.dirname(os.path.abspath(first)), *before, *_path]
            sys.argv = [first, *words]
            main.__file__ = first
            with open(first, "rb") as file:
                code = compile(file.read(), first, "exec")
            exec(code, main.__dict__)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return (leaving.code or 0) & 0xFF
        print(leaving.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """As an interpreter ends, but for the modules, which it would take apart one by one."""
    import atexit

    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    gc.disable()
    os._exit(code)
