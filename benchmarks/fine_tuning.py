"""Useful tokens per second of fine-tuning: packed rows, padded rows, and a transformers loop over padded rows.

    python benchmarks/fine_tuning.py init.path=models/tiny data=chat data.path=conversations.jsonl
    python benchmarks/fine_tuning.py --rows 16 --steps 20 init.path=... data=instruct data.path=... precision=bf16

The words are overrides of train.py. Useful tokens are those of the samples: no padding counts. Each is measured in a
process of its own, as the median of the steps after the first three. transformers: with PyTorch's SDPA and fused AdamW.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WARM = 3  # steps that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="packed rows of a step; a micro-batch has one")
    parser.add_argument(
        "--samples", type=int, default=4, help="padded rows of a micro-batch, as many as fill a packed one"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if options.loop:
        print(json.dumps(transformers_loop(options.loop, options.rows)))
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder, name) for name in ("packed", "padded")}
        measured = {name: ours(run_dir, options) for name, run_dir in runs.items()}
        command = [sys.executable, "-W", "ignore", __file__, "--loop", str(runs["padded"]), "--rows", str(options.rows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured["transformers"] = json.loads(done.stdout.splitlines()[-1])
    print(f"| {'rows':12} | useful tokens/s | packed is faster by |\n|---|---|---|")
    for name, speed in measured.items():
        print(f"| {name:12} | {speed:15,.0f} | {measured['packed'] / speed:19.2f} |")


def ours(run_dir: Path, options: argparse.Namespace) -> float:
    """Useful tokens per second of train.py, in packed rows or in padded ones."""
    samples = 1 if run_dir.name == "packed" else options.samples
    words = [
        *options.overrides,
        f"name={run_dir.name}",
        f"runs_dir={run_dir.parent}",
        f"data.packing={str(run_dir.name == 'packed').lower()}",
        f"train.steps={options.steps}",
        f"train.global_batch_size={options.rows * samples}",
        f"train.micro_batch_size={samples}",
        "train.eval_interval=null",
        "train.eval_samples=1",
        "scheduler.lr_warmup_steps=1",
        "checkpoint.save=false",
        "log.log_interval=1",
    ]
    command = [sys.executable, "-W", "ignore", str(ROOT / "train.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-3000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["tokens_per_second"] for line in lines if "loss" in line][WARM:])


def transformers_loop(run_dir: Path, num_microbatches: int) -> float:
    """Useful tokens per second of a plain loop over what the run in `run_dir` read, padded to the longest of a
    micro-batch."""
    import torch
    from transformers import AutoModelForCausalLM

    from bridge import platform
    from bridge.config import run_config
    from bridge.data import sampler
    from bridge.training import setup

    platform.prepare()
    config = run_config.read(run_dir / "config.yaml")
    dataset = setup.prepare_data(config).build(seed=config.train.seed).train
    size = config.train.global_batch_size // num_microbatches
    dtype = torch.bfloat16 if config.precision.get("bf16") else torch.float32
    device = platform.device()
    model: Any = AutoModelForCausalLM.from_pretrained(str(config.init.path), dtype=dtype)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    speeds, seed = [], config.train.seed
    for step in range(config.train.num_steps):
        platform.synchronize()
        began, tokens = time.perf_counter(), 0
        for number in range(num_microbatches):
            first = (step * num_microbatches + number) * size
            ids = sampler.sample_ids(first, size, size=len(dataset), seed=seed)
            items = [dataset[index] | {"sample_id": torch.tensor(index)} for index in ids]
            batch = {key: value.to(device) for key, value in longest(dataset.collate)(items).items()}
            real = ~batch["padding_mask"]
            logits = model(batch["tokens"], attention_mask=real.long()).logits.float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
            )
            weights = batch["loss_mask"].flatten()
            ((losses * weights).sum() / weights.sum() / num_microbatches).backward()
            tokens += int(real.sum())
        optimizer.step()
        optimizer.zero_grad()
        platform.synchronize()
        speeds.append(tokens / (time.perf_counter() - began))
    return statistics.median(speeds[WARM:])


def longest(collate: Any) -> Any:
    """The same, padding no further than the longest needs."""
    collate.longest = True
    return collate


if __name__ == "__main__":
    main()
