"""Imported by the server of loader processes, and by nothing else: what those need, once for all of them.

The server ends with the trainer and its processes with it, however that happens. Imports only: an operation of torch
could start threads.
"""

# ruff: noqa: E402
import os
from functools import partial

from bridge import platform
from bridge.processes import die_with_parent

die_with_parent()
os.register_at_fork(after_in_child=partial(die_with_parent, os.getpid()))
platform.prepare()  # before megatron-core

from bridge.data import loader
from bridge.data.samples import concatenated

__all__ = ["concatenated", "loader"]
