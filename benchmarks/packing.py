"""What packed rows cost to read, as a share of the step of model=tiny that they are read for.

    python benchmarks/packing.py                 # 20,000 samples, 5 steps of 4 rows of 512 tokens

CPU seconds of this process, on random tokens in samples as long as conversations are. They lie in a store on disk;
rows are read and put together as a run does it with data.num_workers=0.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bridge import platform  # noqa: E402

platform.prepare()

from bridge import parallel  # noqa: E402
from bridge.config import run_config  # noqa: E402
from bridge.data.encode.encoded import Encoded  # noqa: E402
from bridge.data.samples.packed import Packed  # noqa: E402
from bridge.data.samples.store import Store, write  # noqa: E402
from bridge.objectives import passes  # noqa: E402
from bridge.training import batches, setup  # noqa: E402
from bridge.training.step import shape_of  # noqa: E402

ROWS = 4
BATCH = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "eval_interval": None}


def main() -> None:
    """Print the two times and the share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    model = yaml.safe_load((ROOT / "conf/model/tiny.yaml").read_text())
    length = model["max_sequence_length"]
    random = numpy.random.RandomState(0)
    sizes = numpy.clip(random.lognormal(5.0, 0.7, size=options.samples), 2, length + 1).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), (Encoded(random.randint(0, 2048, size=n).tolist(), [1.0] * n, "random", 0) for n in sizes))
        config = run_config.from_dict(_sections(folder, model, steps=options.steps))
        job = setup.build(config, _joined(config))
        dataset = Packed(Store(Path(folder)), numpy.arange(len(sizes)), sequence_length=length, seed=0)
        reading, computing = measure(job, dataset, steps=options.steps)
    share = f"{reading / computing:.2%} of a step"
    print(f"rows {dataset.fill:.1%} full; reading {1e3 * reading:.1f} ms, computing {1e3 * computing:.0f} ms: {share}")
    parallel.teardown()


def _joined(config: Any) -> Any:
    data = setup.prepare_data(config)
    setup.join(config)
    return data


def _sections(folder: str, model: dict[str, Any], *, steps: int) -> dict[str, Any]:
    empty = ("parallelism", "scheduler", "init", "checkpoint", "log", "rerun", "launch")
    return {
        **{name: {} for name in empty},
        "name": "packing",
        "runs_dir": folder,
        "model": model,
        "optimizer": {"optimizer": "adam", "lr": 1e-3, "min_lr": 1e-4},
        "precision": {"params_dtype": "fp32", "grad_reduce_in_fp32": True},
        "peft": {"method": "none"},
        "data": {"source": "mock", "sequence_length": model["max_sequence_length"]},
        "objective": {"name": "next_token"},
        "train": {**BATCH, "steps": steps},
    }


def measure(job: Any, dataset: Any, *, steps: int) -> tuple[float, float]:
    """CPU seconds of one step for its rows, and for the passes through the model; the median step each."""
    train = job.config.train
    stream = batches.training(dataset, train=train, consumed=0, num_workers=0)
    length = job.data.options.sequence_length
    shape = shape_of(train, sequence_length=length, samples=train.global_batch_size, dataset=dataset)
    reading, computing = [], []
    for _ in range(steps):
        started = time.process_time()
        loaded = [next(stream) for _ in range(shape.num_microbatches)]
        read = time.process_time()
        passes.run(job.objective, [iter(loaded)], job.state.model, shape, forward_only=False)
        reading.append(read - started)
        computing.append(time.process_time() - read)
    return float(numpy.median(reading)), float(numpy.median(computing))


if __name__ == "__main__":
    main()
