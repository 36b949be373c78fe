"""Tokens per second and GPU of parallel layouts against one GPU, and measured peak memory beside `dry_run`'s estimate.

    python benchmarks/parallelism.py                                 # on two GPUs or more
    python benchmarks/parallelism.py --model tiny --precision fp32 --layouts one,tp2 --steps 4 -- \\
        data.sequence_length=32                                      # small, on a CPU

Every layout trains the same model on the same global batch, composed as `train.py` composes it, `--repeats` times
round. Layouts with equal processes share them, one after the other (benchmarks/steps.py). A row has the median over the
steps of all rounds, without the first two of each. What follows `--` is added to every command line. `ratio` is to the
layout's own reference in the same invocation: the dense model on one device, or the one with experts.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.layouts import LAYOUTS  # noqa: E402
from bridge import estimate, platform  # noqa: E402
from bridge.config import run_config  # noqa: E402
from bridge.launch.environment import worker_environment  # noqa: E402

# 0.6 B parameters at the width of Llama-3.2-1B. With micro-batches of two sequences a CPU that takes 6 to 7 ms to issue
# the kernels of a layer is no faster than one H200 that runs them: two GPUs that share the layer wait half the time.
SIZES = {
    "llama3_2_1b": (
        "model.num_layers=8",
        "model.vocab_size=32768",
        "data.vocab_size=32768",
        "data.sequence_length=4096",
        "train.global_batch_size=32",
        "train.micro_batch_size=4",
    ),
    "tiny": ("model.num_layers=8", "data.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=1"),
}
# Eight experts as large together as two of the dense MLPs, so that one GPU holds them.
EXPERT_SIZES = {"llama3_2_1b": ("+model.moe_ffn_hidden_size=2048",), "tiny": ()}
WARM_UP = 2  # steps in which kernels are compiled and the optimizer makes its state
COLUMNS = "| layout | devices | tokens/s per device | ratio | peak memory | estimated |"


class Processes(NamedTuple):
    """How many, and their environment: what layouts must agree in to share processes."""

    devices: int
    environment: tuple[tuple[str, str], ...]


def main() -> None:
    arguments = _arguments()
    platform.prepare()
    names = arguments.layouts.split(",")
    folder = Path(tempfile.mkdtemp(prefix="parallelism-", dir=arguments.directory))
    try:
        files = {name: _composed(name, folder, arguments) for name in names}
        together: dict[Processes, list[Path]] = {}
        for name, file in files.items():
            together.setdefault(_processes(name, file), []).append(file)
        rounds = [_measured(together, folder / f"{number}.jsonl") for number in range(arguments.repeats)]
        estimated = {name: _estimated(name, file) for name, file in files.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = {name: statistics.median(_timed(name, rounds)) for name in names}
    speeds = {name: rounds[0][name]["tokens"] / seconds[name] / LAYOUTS[name].devices for name in names}
    print(COLUMNS + "\n" + "|---" * 6 + "|")
    for name in names:
        reference = speeds.get(LAYOUTS[name].reference)
        ratio = f"{speeds[name] / reference:.2f}" if reference else ""
        peak = max(one[name]["peak"] for one in rounds)
        print(
            f"| {name} | {LAYOUTS[name].devices} | {speeds[name]:,.0f} | {ratio} | {peak / 2**30:.2f} GiB "
            f"| {estimated[name] / 2**30:.2f} GiB |",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}; each with its `one`")
    parser.add_argument("--model", default="llama3_2_1b", choices=SIZES)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run")
    parser.add_argument("--repeats", type=int, default=3, help="rounds through all layouts")
    parser.add_argument(
        "--directory", default=tempfile.gettempdir(), help="where configurations are written and removed"
    )
    parser.add_argument("overrides", nargs="*", help="added to every command line")
    arguments = parser.parse_args()
    unknown = set(arguments.layouts.split(",")) - LAYOUTS.keys()
    if unknown:
        parser.error(f"unknown layouts: {', '.join(sorted(unknown))}")
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, the steps that are left out")
    return arguments


def _composed(name: str, folder: Path, arguments: argparse.Namespace) -> Path:
    """A file with the whole configuration of the layout."""
    layout = LAYOUTS[name]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"model={arguments.model}",
        f"precision={arguments.precision}",
        "data=mock",
        *SIZES[arguments.model],
        f"train.steps={arguments.steps}",
        f"train.num_devices={layout.devices}",
        "train.eval_interval=null",
        "train.eval_samples=8",
        f"runs_dir={folder}",
        f"name={name}",
        *layout.overrides,
        *(EXPERT_SIZES[arguments.model] if layout.reference == "experts" else ()),
        *arguments.overrides,
    ]
    file = folder / f"{name}.yaml"
    file.write_text(_output([*command, "--cfg", "job", "--resolve"]))
    return file


def _processes(name: str, file: Path) -> Processes:
    """What `train.py` would start for the configuration."""
    devices = LAYOUTS[name].devices
    fields = run_config.read(file).routed.transformer
    return Processes(devices, tuple(worker_environment(num_devices=devices, fields=fields).items()))


def _estimated(name: str, file: Path) -> int:
    """Bytes on rank 0, which is on the first pipeline stage, as a dry run says."""
    return estimate.memory(run_config.read(file), world_size=LAYOUTS[name].devices)[0].total


def _measured(together: Mapping[Processes, Sequence[Path]], results: Path) -> dict[str, dict[str, Any]]:
    """Layout -> what benchmarks/steps.py says of it, of one round through all."""
    for processes, files in together.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(processes.devices), str(ROOT / "benchmarks" / "steps.py"), str(results), *map(str, files)]
        _output(command, environment=dict(processes.environment))
        print(f"  measured: {', '.join(file.stem for file in files)}", file=sys.stderr, flush=True)
    return {line["name"]: line for line in map(json.loads, results.read_text().splitlines())}


def _timed(name: str, rounds: Sequence[dict[str, dict[str, Any]]]) -> list[float]:
    """Seconds of the layout's steps that count."""
    return [step for one in rounds for step in one[name]["seconds"][WARM_UP:]]


def _output(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    env = os.environ | (environment or {})
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
