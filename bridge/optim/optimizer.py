"""The optimizer of the `optimizer` section, over megatron-core's DDP gradient buffers."""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from bridge.config.annotation import DTYPES
from bridge.config.routing import Routed
from bridge.errors import ConfigError


def build(routed: Routed, *, model: list[Any]) -> MegatronOptimizer:
    """Adam or SGD with global-norm clipping over `model`, DDP-wrapped chunks of this rank.

    Norm weights and biases get no weight decay (megatron-core's rule). Raises ConfigError for combinations
    megatron-core would stop at with an unreadable error.
    """
    config = OptimizerConfig(**{name: typed(name, value) for name, value in routed.optimizer.items()})
    if config.optimizer == "sgd" and config.use_distributed_optimizer:
        key = routed.origin["use_distributed_optimizer"]
        raise ConfigError(f"{key}: true needs Adam, but optimizer.optimizer is sgd; set false")
    optimizer = get_megatron_optimizer(config, model)
    if config.optimizer == "sgd":
        for part in optimizer.chained_optimizers:
            part.init_state_fn = _create_momentum
    return optimizer


def typed(name: str, value: Any) -> Any:
    """The value of an OptimizerConfig field as megatron-core holds it: a torch.dtype for its name."""
    return getattr(torch, DTYPES[value]) if name.endswith("_dtype") else value


def _create_momentum(optimizer: torch.optim.Optimizer, _: OptimizerConfig) -> None:
    """Give SGD's state its tensors before a checkpoint is loaded into it; megatron-core does this for Adam only."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
