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
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
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
MOST_THREADS = 60  # models that a test builds itself may keep their process groups, of three threads each
SETTLE_SECONDS = 2.0  # for threads that have been told to end


class Pristine:
    """The state of this process when this is made, and of a module imported later, right after its import."""

    def __init__(self) -> None:
        self._attributes: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._contents: list[tuple[Any, Any]] = []  # megatron-core's counters and trackers: (container, a copy)
        self._threads = set(threading.enumerate())
        self._handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._switches = [(get, put, get()) for get, put in SWITCHES]
        self._lists = [(owner, name, getattr(owner, name), list(getattr(owner, name))) for owner, name in LISTS]
        self._log_level = logging.root.level
        for module in OTHERS:
            self._attributes[id(module)] = module, dict(vars(module))
        self._attributes[id(pathlib.Path)] = pathlib.Path, dict(vars(pathlib.Path))
        for name in [name for name in sys.modules if _is_ours(name)]:
            self._learn(sys.modules[name])
        sys.meta_path.insert(0, _Importing(self._learn))
        gc.collect()
        gc.freeze()  # what stays need not be looked at again

    def _learn(self, module: types.ModuleType) -> None:
        for owner in (module, *_classes(module)):
            self._attributes[id(owner)] = owner, dict(vars(owner))
        if module.__name__.startswith("megatron."):
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
        release_models()
        deadline = time.monotonic() + SETTLE_SECONDS
        while (left := set(threading.enumerate()) - self._threads) and time.monotonic() < deadline:
            time.sleep(0.005)
        return not left and num_threads() < MOST_THREADS


def release_models() -> None:
    """Let go of what a test trained with its own hands, where that has left many threads: of each process group of
    gloo's one wakes a hundred times a second."""
    if num_threads() < MOST_THREADS or torch.distributed.is_initialized():
        return
    from megatron.core.distributed import DistributedDataParallel

    from bridge.models import ddp

    ddp.release([thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)])
    gc.collect()


class _Importing:
    """A finder that calls `learn` with each module of OURS once it is imported, before a test can change it."""

    def __init__(self, learn: Callable[[types.ModuleType], None]) -> None:
        self._learn = learn

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec: Any = PathFinder.find_spec(name, path, target) if _is_ours(name) else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_learn(module: types.ModuleType) -> None:
            execute(module)
            self._learn(module)

        spec.loader.exec_module = execute_and_learn
        return spec


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in OURS


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
