"""Starts `python ...` of the tests warm: forked from a process that has imported torch and megatron, in 0.1 s, not 6 s.

Between `on()` and `off()`, but inside `real()`, everything that this process starts by `subprocess` with Python's own
command line (`python FILE`, `-m MODULE`, `-c CODE`) is such a fork, and so is what those processes start, workers and
ranks too. To whoever looks, it is the process that was asked for: a child of the process that started it, with the
process id, the exit code, the signals, the session, the file descriptors, the environment and the command line (in
/proc) of a real one.

How: each warm process has a *twin*, forked from it before it ran anything. To start another process, the twin forks
twice and its child ends at once: Linux gives the orphan to the nearest ancestor that asked for orphans
(PR_SET_CHILD_SUBREAPER), which is the process that the twin belongs to. The first twin, of pytest, is a server that
imports and does nothing else, so it has no threads that a fork would lose.

Real processes are what users have, and what tests of imports, of memory and of how an interpreter ends need: those of
tests/test_wheel.py, of README's first command, of torchrun and many more stay real.
"""

from tests.warm.start import off, on, real

__all__ = ["off", "on", "real"]
