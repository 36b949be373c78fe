"""Rules about the batch and the optimizer divided over processes."""

from importlib.util import find_spec

from bridge.config import divisibility
from bridge.config.divisibility import Number
from bridge.config.layout.sizes import Batch, Layout, dp_formula
from bridge.config.routing import Routed
from bridge.errors import ConfigError


def optimizer(routed: Routed, layout: Layout, batch: Batch) -> None:
    instances = routed.number("num_distributed_optimizer_instances")
    if routed.get("average_in_collective"):
        raise ConfigError(
            f"{routed.key('average_in_collective')}: averaging over ranks is not the mean over tokens that the loss "
            "uses here (calculate_per_token_loss); set it to false"
        )
    divisibility.require(Number("DP x CP", layout.dp * layout.cp, movable=False), by=[instances])
    if instances.value > 1 and find_spec("einops") is None:
        raise ConfigError(
            f"{instances.key}: megatron-core makes the groups of {instances.value} instances with the package "
            "einops, which is not installed; install it (pip install einops), or set it to 1"
        )


def global_batch(routed: Routed, layout: Layout, batch: Batch) -> None:
    micro = Number("micro_batch_size", batch.micro_batch_size, "train.micro_batch_size")
    per_step = (micro, Number("DP", layout.dp, movable=False))
    note = dp_formula(layout)
    whole = Number("global_batch_size", batch.global_batch_size, "train.global_batch_size")
    divisibility.require(whole, by=per_step, note=note)
    if batch.rampup is None:
        return
    key = "train.rampup_batch_size"
    if len(batch.rampup) != 3 or min(batch.rampup[:2]) < 1 or batch.rampup[2] < 0:
        raise ConfigError(
            f"{key}: {list(batch.rampup)} is not [start, increment, samples]; set three whole numbers, start and "
            "increment from 1 up"
        )
    start, increment, _ = batch.rampup
    if start > whole.value:
        raise ConfigError(
            f"{key}: start <= global_batch_size must hold, but {start} > {whole.value}; "
            f"set start to {whole.value} or less"
        )
    divisibility.require(Number("start", start, key), by=per_step, note=note)
    divisibility.require(Number("increment", increment, key), by=per_step, note=note)
    growth = Number("(global_batch_size - start)", whole.value - start, key, movable=False)
    divisibility.require(growth, by=[Number("increment", increment, key)])
