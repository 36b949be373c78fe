"""Children that bind their life to their parent themselves, before they import anything that takes long."""

import os
import subprocess
import sys

import pytest

from bridge.processes import PARENT, of_child


@pytest.mark.parametrize("module", ["bridge.launch.worker", "bridge.launch.elastic", "bridge.training.hf_exports"])
def test_a_child_whose_parent_has_ended_already_ends_before_it_imports_torch(module: str):
    child = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module],
        env=of_child(os.environ) | {PARENT: "1"},
        capture_output=True,
        text=True,
    )
    imported = child.stderr.split()
    assert (child.returncode, child.stdout) == (1, "")
    assert "bridge.processes" in imported and not {"torch", "yaml", "bridge.config"} & set(imported)


def test_what_binds_a_child_does_not_reach_its_children():
    source = (
        "import os; from bridge.processes import PARENT, die_with_parent, of_child; die_with_parent(); "
        "assert PARENT not in os.environ and of_child({}) == {PARENT: str(os.getpid())}"
    )
    subprocess.run([sys.executable, "-c", source], env=of_child(os.environ), check=True)
