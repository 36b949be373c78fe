"""Puts back what a test changed in a process that others run in afterwards: see tests/distributed.py."""

import gc
import logging
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch

from tests.forks.sitecustomize import num_threads

OURS = ("bridge", "megatron", "tests")  # packages whose modules and classes are put back as they were found
OTHERS = (os, time, shutil)  # modules in which tests replace functions
CONTAINERS = (dict, list, set)
SWITCHES = (
    (random.getstate, random.setstate),
    (numpy.random.get_state, numpy.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
)
LISTS = ((sys, "path"), (sys, "argv"), (warnings, "filters"), (logging.root, "handlers"))
MOST_THREADS = 300  # a training leaves three of a process group's behind, which something in torch still refers to
SETTLE_SECONDS = 2.0  # for threads that have been told to end


class Pristine:
    """The state of this process when this is made, or for a module imported later, at `learn()`."""

    def __init__(self) -> None:
        self._attributes: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._contents: list[tuple[Any, Any]] = []  # megatron-core's counters and trackers: (container, a copy)
        self._known: set[str] = set()
        self._threads = set(threading.enumerate())
        self._handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._switches = [(get, put, get()) for get, put in SWITCHES]
        self._lists = [(owner, name, getattr(owner, name), list(getattr(owner, name))) for owner, name in LISTS]
        self._log_level = logging.root.level
        for module in OTHERS:
            self._attributes[id(module)] = module, dict(vars(module))
        self._attributes[id(pathlib.Path)] = pathlib.Path, dict(vars(pathlib.Path))
        self.learn()
        gc.collect()
        gc.freeze()  # what stays need not be looked at again

    def learn(self) -> None:
        """Take modules imported since the last call as they are now."""
        for name in [name for name in sys.modules if name.split(".")[0] in OURS and name not in self._known]:
            self._known.add(name)
            module = sys.modules[name]
            for owner in (module, *_classes(module)):
                self._attributes[id(owner)] = owner, dict(vars(owner))
            if name.startswith("megatron."):
                found = [value for value in vars(module).values() if type(value) in CONTAINERS]
                self._contents += [(value, value.copy()) for value in found if value is not vars(module)]

    def restore(self) -> bool:
        """Put everything back. False when a thread of Python's is left, which nothing can end, or too many others."""
        for owner, before in self._attributes.values():
            _put_back(owner, before)
        for container, before in self._contents:
            if container != before:
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for get, put, value in self._switches:
            if get is not torch.are_deterministic_algorithms_enabled or get() != value:  # putting that takes 12 ms
                put(value)
        for owner, name, found, before in self._lists:
            found[:] = before
            setattr(owner, name, found)
        logging.root.setLevel(self._log_level)
        gc.collect()
        deadline = time.monotonic() + SETTLE_SECONDS
        while (left := set(threading.enumerate()) - self._threads) and time.monotonic() < deadline:
            time.sleep(0.005)
        return not left and num_threads() < MOST_THREADS


def _classes(module: types.ModuleType) -> Iterator[type]:
    return (found for found in vars(module).values() if isinstance(found, type) and found.__module__ == module.__name__)


def _put_back(owner: Any, before: dict[str, Any]) -> None:
    """Attributes of a module or class. Submodules, and what Python itself adds to a class, stay."""
    now = vars(owner)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            setattr(owner, name, value)
    if len(now) > len(before):
        for name in [name for name in now if name not in before]:
            if not name.startswith("__") and not isinstance(now[name], types.ModuleType):
                delattr(owner, name)
