"""The benchmark of parallel layouts runs, small, on a CPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "data.sequence_length=32")


@pytest.mark.usefixtures("warm_processes")
def test_the_benchmark_of_layouts_runs_small(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "benchmarks/parallelism.py", "--model", "tiny", "--precision", "fp32"]
    command += ["--layouts", "one,pp2", "--steps", "3", "--repeats", "1"]
    command += ["--directory", str(tmp_path), "--", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| (\w+) \| (\d) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) GiB", done.stdout, re.MULTILINE)
    (one, two) = ([name, devices, float(ratio)] for name, devices, _, ratio, _ in rows)
    assert one == ["one", "1", 1.0]
    assert two[:2] == ["pp2", "2"]
    speeds = [float(row[2].replace(",", "")) for row in rows]
    assert abs(two[2] - speeds[1] / speeds[0]) < 0.01
    assert not list(tmp_path.iterdir())
