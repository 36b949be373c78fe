"""What benchmarks/parallelism.py starts on every rank: training steps of one layout after the other, timed.

    torchrun --nproc-per-node N benchmarks/steps.py RESULTS CONFIG.yaml ...

Rank 0 adds a line of JSON to the file RESULTS for each configuration: `name`, `tokens` of a step, `seconds` of each
step, and `peak`, the most bytes on rank 0. Nothing is saved, so a large model costs no disk.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bridge import parallel, platform  # noqa: E402
from bridge.config import run_config  # noqa: E402
from bridge.config.run_config import RunConfig  # noqa: E402
from bridge.training import batches, setup  # noqa: E402
from bridge.training.loss_policy import LossPolicy  # noqa: E402
from bridge.training.rerun import Rerun  # noqa: E402
from bridge.training.step import shape_of, train_step  # noqa: E402


def main() -> None:
    results = Path(sys.argv[1])
    for file in map(Path, sys.argv[2:]):
        measured = measure(run_config.read(file))
        if parallel.is_main():
            with results.open("a") as lines:
                lines.write(json.dumps({"name": file.stem, **measured}) + "\n")
        parallel.teardown(keep_world=True)
    torch.distributed.destroy_process_group()


def measure(config: RunConfig) -> dict[str, Any]:
    """The values of a line of RESULTS."""
    data = setup.prepare_data(config)
    setup.join(config)
    gc.collect()  # of the layout before
    before = torch.cuda.memory_allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    job = setup.build(config, data)
    batch_size = config.train.global_batch_size
    length, dataset = data.options.sequence_length, job.datasets.train
    shape = shape_of(config.train, sequence_length=length, samples=batch_size, dataset=dataset)
    streams = [
        batches.training(job.datasets.train, train=config.train, consumed=0, num_workers=data.options.num_workers)
        for _ in job.state.model
    ]
    policy = LossPolicy(config, job.progress)
    rerun = Rerun(config, policy, step=0, model=job.state.model)
    seconds = []
    for step in range(1, config.train.num_steps + 1):
        platform.synchronize()
        started = time.perf_counter()
        train_step(job.objective, job.state, streams, shape, step=step, policy=policy, rerun=rerun)
        platform.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = platform.peak_memory_bytes() - before
    tokens = batch_size * shape.sequence_length
    return {"tokens": tokens, "seconds": seconds, "peak": peak}


if __name__ == "__main__":
    platform.prepare()
    main()
