"""The closed sections of a configuration: in them an unknown key, a wrong type or a value out of range is an error.

Field metadata: `min` is the smallest legal value (of a list: of each item), `duration` marks a length of time
(bridge.config.durations).
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from bridge.config import durations


def _from(smallest: float, default: Any) -> Any:
    return field(default=default, metadata={"min": smallest})


def _duration(default: str | None = None) -> Any:
    return field(default=default, metadata={"duration": True})


Interval = int | Literal["epoch"] | None  # N steps; epoch: whenever one ends
STEPS = 300  # of a run that says nothing about its length
# Optimizer -> learning rate where none is set: of random weights, and of those that init.path brings.
RATES = {"adam": (1e-3, 1e-5), "sgd": (0.1, 1e-3)}


@dataclass(frozen=True)
class Train:
    """What the loop does. Batch sizes count sequences; intervals count steps. Without steps and epochs: STEPS steps."""

    steps: int | None = _from(1, None)
    epochs: int | None = _from(1, None)
    global_batch_size: int = _from(1, 8)
    micro_batch_size: int | None = _from(1, None)
    rampup_batch_size: list[int] | None = None
    eval_interval: Interval = field(default=100, metadata={"min": 1})
    eval_samples: int | None = _from(1, 128)
    patience: int | None = _from(1, None)
    exit_interval: int | None = _from(1, None)
    exit_after: str | None = _duration()
    iterations_to_skip: list[int] = field(default_factory=list, metadata={"min": 1})
    nonfinite_loss: Literal["error", "skip", "continue"] = "error"
    spiking_loss: Literal["error", "skip", "continue"] = "continue"
    loss_spike_factor: float = _from(1, 10.0)
    num_nodes: int = _from(1, 1)
    num_devices: int | None = _from(1, None)
    seed: int = _from(0, 1234)

    @property
    def num_steps(self) -> int:
        """steps, once they are known: those of train.epochs follow from the prepared data."""
        assert self.steps is not None, "the steps of train.epochs are not known yet"
        return self.steps

    def sequences_per_pass(self, data_parallel_size: int) -> int:
        """micro_batch_size; unless set, the most that divide one rank's share of every batch, up to 4.

        The default command so runs on 1 to 8 devices with one and the same global batch.
        """
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        share = math.gcd(self.global_batch_size, *(self.rampup_batch_size or [])[:2]) // data_parallel_size
        return max(size for size in (1, 2, 3, 4) if share % size == 0 and size <= max(share, 1))


@dataclass(frozen=True)
class Scheduler:
    """Arguments of megatron-core's OptimizerParamScheduler, in steps; its max_lr and min_lr come from the optimizer."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_warmup_init: float = _from(0, 0.0)
    lr_warmup_steps: int | None = _from(0, None)
    lr_decay_steps: int | None = _from(1, None)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    wsd_decay_steps: int | None = _from(1, None)
    start_weight_decay: float | None = _from(0, None)
    end_weight_decay: float | None = _from(0, None)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"

    def decay_steps(self, train_steps: int) -> int:
        """Steps until the learning rate is at its lowest, in a run of `train_steps`."""
        return self.lr_decay_steps or train_steps

    def warmup_steps(self, train_steps: int) -> int:
        """Steps of warm-up; unless set, a twentieth of the decay steps, so that a short run needs no key for it."""
        return self.decay_steps(train_steps) // 20 if self.lr_warmup_steps is None else self.lr_warmup_steps


@dataclass(frozen=True)
class Init:
    """Where the weights come from: a Hugging Face directory, a Megatron checkpoint, or (None) random.

    random: fine-tuning data trains random weights only when this says so.
    """

    path: str | None = None
    random: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """When and how to save, how many to keep (None: all), and what to do about a damaged checkpoint on resume."""

    save: bool = True
    save_interval: Interval = field(default=None, metadata={"min": 1})
    keep_last: int | None = _from(1, None)
    keep_best: str | None = None
    best_is: Literal["lowest", "highest"] = "lowest"
    async_save: bool = False
    write_timeout: str | None = _duration("30m")
    save_hf: bool = False
    verify: bool = False
    fall_back: bool = False


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases; off while project is None."""

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: Literal["online", "offline", "disabled"] = "online"


@dataclass(frozen=True)
class Log:
    """What is reported where. log_interval counts steps between console lines."""

    log_interval: int = _from(1, 10)
    straggler_interval: int | None = _from(1, None)
    sample_ids: bool = False
    tensorboard: bool = False
    wandb: Wandb = field(default_factory=Wandb)


@dataclass(frozen=True)
class Rerun:
    """megatron-core's rerun state machine: a step with a suspicious loss is computed again on the same samples."""

    mode: Literal["disabled", "validate_results", "report_determinism_stats"] = "disabled"
    error_injection_rate: int = _from(0, 0)
    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = "transient_error"


@dataclass(frozen=True)
class Launch:
    """How the worker processes are started, when they are given up, and how often they are started anew."""

    max_restarts: int = _from(0, 0)
    hang_timeout: str | None = _duration("30m")
    detach: bool = False
    check_paths: bool = True
    check_memory: bool = True

    @property
    def hang_seconds(self) -> float | None:
        """hang_timeout in seconds."""
        return None if self.hang_timeout is None else durations.seconds(self.hang_timeout)


@dataclass(frozen=True)
class ConvertConfig:
    """What `convert.py` does (conf/convert.yaml)."""

    mode: Literal["import", "export", "verify", "yaml"]
    hf: str | None = None
    megatron: str | None = None
    model: dict[str, Any] | None = None
    reference: str | None = None
    family: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    make_vocab_size_divisible_by: int | None = _from(1, None)
    max_shard_size: str = "5GB"
    workers: int | None = _from(1, None)
    check_finite: bool = False
    overwrite: bool = False
    prompts: list[str] | None = None
    tolerance: float = _from(0, 1e-4)
    report: str | None = None
