"""Notes every fork of Python code by a process that has several threads, in all processes of the tests.

Such a fork can hang for ever: a lock that another thread holds at that moment is never released in the child. This
directory is on PYTHONPATH (tests/conftest.py), so Python imports this file as it starts; a test fails on what is noted.
"""

import os
import sys
import traceback

NOTES = "BRIDGE_TEST_FORKS"  # environment: the directory for notes
HERE = os.path.dirname(os.path.abspath(__file__))
TESTS, PRODUCT = os.path.dirname(HERE) + os.sep, os.path.join(os.path.dirname(os.path.dirname(HERE)), "bridge") + os.sep


COMPILER = os.path.join("torch", "_inductor", "compile_worker", "")  # torch's own, on a GPU: it runs nothing of ours


def num_threads() -> int:
    """Threads of this process, those that Python knows nothing of too."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Threads:"))


def watch(event: str, _: object) -> None:
    """Audit hook."""
    forks = event in ("os.fork", "os.forkpty")
    # Popen alone forks outside of Python; not with a function to run between fork and exec.
    if event == "subprocess.Popen":
        forks = sys._getframe(1).f_locals.get("preexec_fn") is not None
    directory = os.environ.get(NOTES)
    if not forks or directory is None or num_threads() == 1:
        return
    files = [frame.filename for frame in traceback.extract_stack()]
    if any(file.startswith(TESTS) for file in files[:-1]) and not any(file.startswith(PRODUCT) for file in files):
        return  # a helper of the tests
    if COMPILER in sys.argv[0]:
        return
    with open(os.path.join(directory, f"{os.getpid()}.txt"), "a") as file:
        file.write(f"{event} in process {os.getpid()} with {num_threads()} threads, {sys.argv}\n")
        file.writelines(traceback.format_stack()[:-1])


sys.addaudithook(watch)
