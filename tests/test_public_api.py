"""`import bridge` is free; its functions load with their first use."""

import subprocess
import sys

import pytest

import bridge


def test_import_costs_no_torch():
    code = "import sys, bridge; assert 'load_model' in dir(bridge); assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_unknown():
    with pytest.raises(AttributeError, match="module 'bridge' has no attribute 'load_modle'"):
        bridge.load_modle  # noqa: B018
