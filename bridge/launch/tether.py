"""Ties jobs that a launcher starts in processes of its own, as joblib's does, to the command that was typed.

Such a process would go on when the command is gone, and its workers with it. The command therefore holds a lock, which
the kernel frees when it ends, however that happens; every job waits for that lock in a thread. Free, and a signal noted
in the file: the job saves and stops. Free without: it is killed. Jobs in Slurm are not tied.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bridge.launch import process_tree
from bridge.runs.result import EXIT_CODES

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
WORKERS = ("bridge.launch.worker", "bridge.launch.elastic", "submitit.core._submit")
HOLDER = "BRIDGE_HOLDER"  # environment of the jobs: host and directory of the command's locks


def announcement(signum: signal.Signals, *, saves: bool = True) -> str:
    """What a command says when it is told to stop. saves: whether its workers write checkpoints."""
    if not saves:
        return f"{signum.name}: stopping; nothing is saved"
    hint = " (again: stop at once, without a save)" if signum == signal.SIGINT else ""
    return f"{signum.name}: saving what was trained, then stopping{hint}"


class Command:
    """The command's side, from when its launcher is known until `release`. Answers the signals to stop."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="bridge-command-"))
        self._own, self._jobs = (_open(self.directory / name) for name in ("own", "jobs"))
        fcntl.flock(self._own, fcntl.LOCK_EX)
        os.environ[HOLDER] = json.dumps([socket.gethostname(), str(self.directory)])
        self._told: signal.Signals | None = None
        self._typed = 0  # Ctrl-C, not answered yet
        self._before = {signum: signal.signal(signum, self._receive) for signum in STOP_SIGNALS}
        # Ctrl-C reaches every process of the terminal, and those of a launcher would kill their jobs in the middle of a
        # save. They inherit that it is blocked (loky unblocks it); a thread takes it here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        threading.Thread(target=self._listen, args=[threading.get_ident()], daemon=True).start()

    def release(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.environ.pop(HOLDER, None)
        os.close(self._own)
        os.close(self._jobs)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _listen(self, main_thread: int) -> None:
        while True:
            signal.sigwait({signal.SIGINT})
            self._typed += 1
            signal.pthread_kill(main_thread, signal.SIGTERM)  # ends what it waits for

    def _receive(self, number: int, frame: FrameType | None) -> None:
        signum = signal.SIGINT if self._typed else signal.Signals(number)
        self._typed = 0
        if self._told is None:
            self._told = signum
            print(announcement(signum), file=sys.stderr, flush=True)
            os.pwrite(self._own, signum.name.encode(), 0)
            fcntl.flock(self._own, fcntl.LOCK_UN)
            fcntl.flock(self._jobs, fcntl.LOCK_EX)  # once no job is left: a launcher that sees one end kills the others
            sys.exit(EXIT_CODES["stopped"])
        if signum == self._told == signal.SIGINT:
            print("SIGINT again: ending the workers at once", file=sys.stderr, flush=True)
            for process in process_tree.tree(os.getpid())[1:]:
                if process_tree.runs(process, *WORKERS):  # not what the launcher has to clean up with
                    process_tree.send(process, signal.SIGKILL)


class _Follower:
    """The side of one process with jobs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command passes it on
        self._idle = signal.getsignal(signal.SIGTERM)
        self.asked: signal.Signals | None = None
        self._free = threading.Event()
        try:
            self._own, self.jobs = (_open(directory / name, flags=os.O_RDWR) for name in ("own", "jobs"))
        except FileNotFoundError:
            os._exit(EXIT_CODES["stopped"])  # the command has gone: nobody is left to tell
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        fcntl.flock(self._own, fcntl.LOCK_SH)
        name = os.pread(self._own, 20, 0).decode()
        if not name:
            shutil.rmtree(self._directory, ignore_errors=True)
            process_tree.kill_below(os.getpid())
            os._exit(EXIT_CODES["stopped"])
        self.asked = signal.Signals[name]
        self._free.set()

    def stop(self, ended: threading.Event) -> None:
        """Send this process a SIGTERM as soon as the command is told to stop and somebody here listens to it."""
        self._free.wait()
        while not ended.wait(0.05):
            if signal.getsignal(signal.SIGTERM) != self._idle:
                os.kill(os.getpid(), signal.SIGTERM)
                return


_follower: _Follower | None = None


@contextmanager
def following() -> Iterator[bool]:
    """Inside, this process works on a job of the command. Yields whether it should: not once that was told to stop."""
    global _follower
    directory = _directory()
    if directory is None:
        yield True
        return
    _follower = _follower or _Follower(directory)
    fcntl.flock(_follower.jobs, fcntl.LOCK_SH)
    ended = threading.Event()
    threading.Thread(target=_follower.stop, args=[ended], daemon=True).start()
    try:
        yield _follower.asked is None
    finally:
        ended.set()
        fcntl.flock(_follower.jobs, fcntl.LOCK_UN)


def told() -> signal.Signals | None:
    """The signal that the command of this process's job was told to stop by."""
    return None if _follower is None else _follower.asked


def tied() -> bool:
    """Whether this process works on jobs of a command elsewhere on this machine."""
    return _follower is not None


def _directory() -> Path | None:
    host, directory = json.loads(os.environ.get(HOLDER, "[null, null]"))
    return Path(directory) if host == socket.gethostname() else None


def _open(path: Path, *, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    return os.open(path, flags, 0o600)
