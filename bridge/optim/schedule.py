"""The learning rate and weight decay schedule: megatron-core's OptimizerParamScheduler, counted in optimizer steps.

Counting steps, not samples, makes the schedule independent of batch size, data-parallel size and batch ramp-up.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from bridge.config.schema import Scheduler
from bridge.errors import ConfigError

# Settings of the two that a resumed run may change, under the names of their keys, and the attribute that holds each.
SCHEDULER = {
    "lr_decay_style": "lr_decay_style",
    "lr_warmup_init": "init_lr",
    "lr_warmup_steps": "lr_warmup_steps",
    "lr_decay_steps": "lr_decay_steps",
    "lr_wsd_decay_style": "lr_wsd_decay_style",
    "wsd_decay_steps": "wsd_decay_steps",
    "start_weight_decay": "start_wd",
    "end_weight_decay": "end_wd",
    "weight_decay_incr_style": "wd_incr_style",
}
OPTIMIZER = (
    "lr",
    "min_lr",
    "weight_decay",
    "decoupled_weight_decay",
    "clip_grad",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "sgd_momentum",
)


def build(
    scheduler: Scheduler, *, optimizer: MegatronOptimizer, fields: Mapping[str, Any], steps: int
) -> OptimizerParamScheduler:
    """The schedule of `scheduler` between `fields["lr"]` and `fields["min_lr"]` (OptimizerConfig fields) over `steps`.

    As in megatron-core, the first step uses lr_warmup_init when there is a warm-up. Raises ConfigError where
    megatron-core would assert.
    """
    max_lr, min_lr = fields["lr"], fields.get("min_lr") or 0.0
    decay_steps = scheduler.decay_steps(steps)
    weight_decay = fields.get("weight_decay", 0.01)
    start = weight_decay if scheduler.start_weight_decay is None else scheduler.start_weight_decay
    end = weight_decay if scheduler.end_weight_decay is None else scheduler.end_weight_decay
    if scheduler.lr_warmup_init > max_lr:
        raise ConfigError(
            f"scheduler.lr_warmup_init: {scheduler.lr_warmup_init} is above optimizer.lr ({max_lr}); set that or less"
        )
    if start > end:
        raise ConfigError(f"scheduler.start_weight_decay: {start} is above the end value, {end}; set {end} or less")
    if scheduler.weight_decay_incr_style == "constant" and start != end:
        raise ConfigError(
            f"scheduler.weight_decay_incr_style: constant cannot go from {start} to {end}; set linear or cosine"
        )
    if scheduler.wsd_decay_steps is not None and scheduler.wsd_decay_steps > decay_steps:
        raise ConfigError(
            f"scheduler.wsd_decay_steps: {scheduler.wsd_decay_steps} is more than the {decay_steps} decay steps; "
            f"set {decay_steps} or less"
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=scheduler.lr_warmup_init,
        max_lr=max_lr,
        min_lr=min_lr,
        lr_warmup_steps=scheduler.warmup_steps(steps),
        lr_decay_steps=decay_steps,
        lr_decay_style=scheduler.lr_decay_style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=decay_steps,
        wd_incr_style=scheduler.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=scheduler.wsd_decay_steps,
        lr_wsd_decay_style=scheduler.lr_wsd_decay_style,
    )


def settings(scheduler: OptimizerParamScheduler, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Optimizer and schedule as they are configured: full key -> plain value."""
    values = {f"optimizer.{name}": getattr(optimizer.config, name) for name in OPTIMIZER}
    return values | {f"scheduler.{name}": getattr(scheduler, attribute) for name, attribute in SCHEDULER.items()}


def resume(scheduler: OptimizerParamScheduler, *, num_steps: int) -> None:
    """Stand where the schedule stands after `num_steps` optimizer steps."""
    scheduler.num_steps = 0
    scheduler.step(num_steps)


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate the next optimizer step will use (of the parameter groups without a rate of their own)."""
    rate = get_canonical_lr_for_logging(optimizer.param_groups)
    assert rate is not None, "no parameter group follows the schedule"
    return rate
