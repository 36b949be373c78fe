"""Imported by the fork server of tests/distributed.py after tests/preload.py: all of bridge, 0.4 s in every worker."""

import gc
import importlib
import pkgutil

import bridge
import tests.pristine  # noqa: F401

for module in pkgutil.walk_packages(bridge.__path__, "bridge."):
    importlib.import_module(module.name)

gc.freeze()  # a worker's collections need not look at all this, nor write to its pages
