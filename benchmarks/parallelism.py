"""Tokens per second and GPU of parallel layouts against one GPU, and measured peak memory beside `dry_run`'s estimate.

    python benchmarks/parallelism.py                                 # on two GPUs or more
    python benchmarks/parallelism.py --model tiny --precision fp32 --layouts one,tp2 --steps 4 --interval 1 -- \\
        data.sequence_length=32                                      # small, on a CPU

Every layout trains the same model on the same global batch with `train.py`, each run in processes of its own, one
layout after the other, `--repeats` times round. A row has the median over the reports of all its runs; the first report
of each is left out. What follows `--` is added to every command line. `ratio` is to the layout's own reference in the
same invocation: the dense model on one device, or the one with experts.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.layouts import LAYOUTS, Layout  # noqa: E402

# About 0.7 B parameters at the width of Llama-3.2-1B: enough for large matrix products, small enough for checkpoints.
SIZES = {
    "llama3_2_1b": (
        "model.num_layers=8",
        "model.vocab_size=32768",
        "data.vocab_size=32768",
        "data.sequence_length=4096",
        "train.global_batch_size=16",
        "train.micro_batch_size=2",
    ),
    "tiny": ("model.num_layers=8", "data.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=1"),
}
COLUMNS = "| layout | devices | tokens/s per device | ratio | peak memory | estimated |"


class Measured(NamedTuple):
    """Tokens per second of one device by report; bytes on rank 0 at its peak, and as estimated for it."""

    speeds: list[float]
    peak: int
    estimated: int


def main() -> None:
    arguments = _arguments()
    names = arguments.layouts.split(",")
    folder = Path(tempfile.mkdtemp(prefix="parallelism-", dir=arguments.directory))
    try:
        rounds = [{name: _run(name, folder, arguments) for name in names} for _ in range(arguments.repeats)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    speeds = {name: statistics.median(speed for one in rounds for speed in one[name].speeds) for name in names}
    print(COLUMNS + "\n" + "|---" * 6 + "|")
    for name in names:
        layout, measured = LAYOUTS[name], rounds[-1][name]
        reference = speeds.get(layout.reference)
        ratio = f"{speeds[name] / reference:.2f}" if reference else ""
        print(
            f"| {name} | {layout.devices} | {speeds[name]:,.0f} | {ratio} | {measured.peak / 2**30:.2f} GiB "
            f"| {measured.estimated / 2**30:.2f} GiB |",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}; each with its `one`")
    parser.add_argument("--model", default="llama3_2_1b", choices=SIZES)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--interval", type=int, default=5, help="steps between two reports")
    parser.add_argument("--repeats", type=int, default=3, help="rounds through all layouts")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where run directories are made and removed")
    parser.add_argument("overrides", nargs="*", help="added to every command line")
    arguments = parser.parse_args()
    unknown = set(arguments.layouts.split(",")) - LAYOUTS.keys()
    if unknown:
        parser.error(f"unknown layouts: {', '.join(sorted(unknown))}")
    return arguments


def _run(name: str, folder: Path, arguments: argparse.Namespace) -> Measured:
    layout = LAYOUTS[name]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"model={arguments.model}",
        f"precision={arguments.precision}",
        "data=mock",
        *SIZES[arguments.model],
        f"train.steps={arguments.steps}",
        f"log.log_interval={arguments.interval}",
        f"train.num_devices={layout.devices}",
        "train.eval_interval=null",
        "train.eval_iters=1",
        f"runs_dir={folder}",
        f"name={name}",
        *layout.overrides,
        *arguments.overrides,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    measured = _read(folder / name, layout)
    print(f"  {name}: {statistics.median(measured.speeds):,.0f} tokens/s per device", file=sys.stderr, flush=True)
    shutil.rmtree(folder / name)
    return measured


def _read(run: Path, layout: Layout) -> Measured:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    reports = list(dict.fromkeys(line["tokens_per_second"] for line in steps))  # a report's steps share its mean
    speeds = [speed / layout.devices for speed in reports[1:] or reports]
    return Measured(speeds, max(line["peak_memory_bytes"] for line in steps), _estimated(run, layout))


def _estimated(run: Path, layout: Layout) -> int:
    """Bytes on rank 0, which is on the first pipeline stage."""
    from bridge import platform

    platform.prepare()
    from bridge import estimate
    from bridge.config import run_config

    stages = estimate.memory(run_config.read(run / "config.yaml"), world_size=layout.devices)
    return stages[0].total


if __name__ == "__main__":
    main()
