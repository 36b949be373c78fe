"""Two GPUs against one: the same loss curve in every layout, from one checkpoint, in bf16 on Transformer Engine.

    python -m pytest tests/gpu/test_two_gpus.py -s

About 4 minutes on two H200s. Needs no network and 20 GB of disk. The speeds are benchmarks/parallelism.py's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.layouts import LAYOUTS
from bridge import platform
from bridge.training import metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(platform.num_devices() < 2, reason="fewer than two CUDA devices"),
]
ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 30
RUN = (
    "model=tiny",
    "model.num_layers=8",
    "precision=bf16",
    "data=stdlib",
    "data.sequence_length=256",
    "train.global_batch_size=16",
    "train.micro_batch_size=2",
    "train.eval_interval=null",
    "train.eval_iters=1",
    "log.log_interval=1",
)
# Of the loss in nats. A curve of another seed is off by more than 0.02 already in its first steps (checked below), one
# of another split into micro-batches by less than 0.002: sums in bf16 in another order.
NOISE = 0.01
OVERLAPPED = {
    "tp2 buffers": ("tp2", ("+parallelism.tp_comm_overlap=true",)),
    "pp2_vpp2 gathers": (
        "pp2_vpp2",
        ("parallelism.use_distributed_optimizer=true", "parallelism.overlap_grad_reduce=true"),
    ),
    "ep2 experts": ("ep2", ("+parallelism.overlap_moe_expert_parallel_comm=true",)),
}


class Curves:
    """Losses by step of runs that start from one checkpoint for each reference; each run is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, ...], list[float]] = {}

    def of(self, name: str, *overrides: str) -> list[float]:
        """The losses of layout `name`."""
        begin = self._run_dir(LAYOUTS[name].reference, "train.steps=2")
        self._run_dir(name, f"train.steps={STEPS}", f"init.path={begin}", *overrides)
        return self.made[name, f"train.steps={STEPS}", f"init.path={begin}", *overrides]

    def _run_dir(self, name: str, *overrides: str) -> Path:
        asked = (name, *overrides)
        run = self.folder / "runs" / f"run_{list(self.made).index(asked) if asked in self.made else len(self.made)}"
        if asked not in self.made:
            layout = LAYOUTS[name]
            command = [sys.executable, str(ROOT / "train.py"), *RUN, *layout.overrides, *overrides]
            command += [f"train.num_devices={layout.devices}", f"name={run.name}"]
            # Transformer Engine's buffers then use CUDA IPC: multicast is not to be used on a shared host.
            env = os.environ | {"UB_SKIPMC": "1"}
            done = subprocess.run(
                command, cwd=self.folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
            self.made[asked] = [line["loss"] for line in metrics.read(run) if "loss" in line]
        return run


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    return Curves(tmp_path_factory.mktemp("curves"))


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.devices == 2])
def test_two_devices_learn_what_one_does(name: str, curves: Curves):
    one, two = curves.of(LAYOUTS[name].reference), curves.of(name)
    print(f"{name}: largest difference {max(abs(a - b) for a, b in zip(one, two, strict=True)):.4f} nats")
    assert two == pytest.approx(one, abs=NOISE)
    assert one[-1] < one[0] - 0.5


@pytest.mark.parametrize("case", OVERLAPPED)
def test_overlapped_communication_changes_nothing(case: str, curves: Curves):
    name, overrides = OVERLAPPED[case]
    assert curves.of(name, *overrides) == pytest.approx(curves.of(name), abs=NOISE)


def test_the_tolerance_tells_runs_apart(curves: Curves):
    """Another order of the data is not within the noise; another split of the batch is."""
    one = curves.of("one")
    assert curves.of("one", "train.micro_batch_size=4") == pytest.approx(one, abs=NOISE / 2)
    other = curves.of("one", "train.seed=4321")
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 2 * NOISE
