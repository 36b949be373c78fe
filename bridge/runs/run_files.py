"""What the files of a run directory are called. The names are here and nowhere else.

RUN_DIR/config.yaml        the composed configuration: what workers read, and what a resume is compared with
RUN_DIR/overrides.yaml     the overrides of the command line, a list
RUN_DIR/lock               held by the processes of the run
RUN_DIR/metrics.jsonl      a JSON object for every reported step, evaluation and save
RUN_DIR/result.json        how the run ended
RUN_DIR/job.json           the Slurm job it was submitted as
RUN_DIR/checkpoints/       ROOT of bridge/weights/locate.py
RUN_DIR/logs/              rank_N.log, .error, .hang, .rejected; launcher.log
RUN_DIR/hf/ sample_ids/ tensorboard/ wandb/
SWEEP_DIR/sweep.json       a row for every job of a sweep; its run directories lie beside it
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bridge.weights.pointer import CHECKPOINTS

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
LOCK = "lock"
METRICS = "metrics.jsonl"
RESULT = "result.json"
SLURM_JOB = "job.json"
SWEEP = "sweep.json"
LOGS, SAMPLE_IDS, TENSORBOARD, WANDB, HF = "logs", "sample_ids", "tensorboard", "wandb", "hf"
DIRECTORIES = (CHECKPOINTS, LOGS, SAMPLE_IDS, TENSORBOARD, WANDB, HF)
"""Directories of a run: no other run lies in them."""

OfRank = Literal["log", "error", "hang", "rejected"]


def rank_file(run_dir: Path, kind: OfRank, *, rank: int) -> Path:
    """logs/rank_N.log: what a rank prints; .error: how it failed; .hang: where it is stuck; .rejected: a result that
    the machine computed wrongly."""
    return run_dir / LOGS / f"rank_{rank}.{kind}"


def rank_files(run_dir: Path, kind: OfRank) -> Iterator[tuple[int, Path]]:
    """(rank, file) of those ranks that have one, by name."""
    for file in sorted((run_dir / LOGS).glob(f"rank_*.{kind}")):
        yield int(file.stem.removeprefix("rank_")), file


def launcher_log(run_dir: Path) -> Path:
    """Where torchrun's launcher prints what is not a rank's."""
    return run_dir / LOGS / "launcher.log"
