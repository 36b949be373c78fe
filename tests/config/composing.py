"""Composes conf/ as train.py and convert.py do, for tests about what it says."""

import sys
from typing import Any
from unittest import mock

from bridge.launch import compose


def composed(*overrides: str, primary: str = "train") -> dict[str, Any]:
    """The resolved configuration of conf/<primary>.yaml under `overrides`, as plain Python."""
    with mock.patch.object(sys, "argv", ["train.py", *overrides]):
        return compose.jobs(primary)[0].settings
