"""Seconds to build a model with random weights: drawn as here, the same in every layout, and as megatron-core does it.

    python benchmarks/initialise.py                                     # Llama-3.1-8B in bf16 on one GPU
    python benchmarks/initialise.py --tensor 8                          # what one of eight tensor ranks does of it
    python benchmarks/initialise.py --model tiny --dtype fp32           # small, on a CPU

After one build of each that is not counted, both are built `--repeats` times, in turn; a row has the least of them,
and the share of it that is not spent on building the modules (a build without any random weights).
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bridge import parallel, platform  # noqa: E402
from bridge.api.models import parse_dtype  # noqa: E402
from bridge.config.routing import Routed, route  # noqa: E402
from bridge.models import gpt, initialise  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3_1_8b", help="a file of conf/model")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tensor", type=int, default=1, help="tensor ranks, of which one is built")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    section = yaml.safe_load((ROOT / "conf" / "model" / f"{arguments.model}.yaml").read_text())
    routed = route({"model": section, "parallelism": {"tensor_model_parallel_size": arguments.tensor}})
    dtype = parse_dtype(arguments.dtype)
    with parallel.fake(arguments.tensor, 0, routed.transformer):
        times: dict[str, list[float]] = {"nothing drawn": [], "megatron-core": [], "every layout": []}
        for _ in range(arguments.repeats + 1):
            times["nothing drawn"].append(_seconds(routed, dtype, seed=None))
            with _megatrons_own():
                times["megatron-core"].append(_seconds(routed, dtype, seed=1))
            times["every layout"].append(_seconds(routed, dtype, seed=1))
    least = {name: min(seconds[1:]) for name, seconds in times.items()}
    print(f"{arguments.model}, {arguments.dtype}, one of {arguments.tensor} tensor ranks, {platform.device_name()}")
    print("| weights | seconds | of them drawing | ratio |\n|---|---|---|---|")
    for name, seconds in least.items():
        drawing = seconds - least["nothing drawn"]
        print(f"| {name} | {seconds:.3f} | {drawing:.3f} | {seconds / least['megatron-core']:.2f} |")


@contextmanager
def _megatrons_own() -> Iterator[None]:
    with mock.patch.object(initialise, "draw"), mock.patch.object(initialise, "noted", return_value=nullcontext()):
        yield


def _seconds(routed: Routed, dtype: torch.dtype, *, seed: int | None) -> float:
    gc.collect()  # the model before
    platform.synchronize()
    started = time.perf_counter()
    model = gpt.build(routed, dtype=dtype, seed=seed)
    platform.synchronize()
    seconds = time.perf_counter() - started
    del model
    return seconds


if __name__ == "__main__":
    main()
