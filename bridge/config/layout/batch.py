"""Rules about the batch and the optimizer divided over processes."""

from bridge.config import divisibility
from bridge.config.divisibility import Number
from bridge.config.layout.sizes import Batch, Fields, Layout, dp_formula
from bridge.errors import ConfigError


def optimizer(fields: Fields, layout: Layout, batch: Batch) -> None:
    instances = fields.number("num_distributed_optimizer_instances")
    gathers = fields.get("overlap_param_gather", False)
    needs = [("overlap_param_gather", "use_distributed_optimizer")] if gathers else []
    needs += [("overlap_param_gather", "overlap_grad_reduce")] if gathers else []
    needs += [(instances.name, "use_distributed_optimizer")] if instances.value > 1 else []
    for name, needed in needs:
        if not fields.get(needed, False):
            raise ConfigError(
                f"{fields.key(name)}: {fields.get(name)} needs {needed}, which is false; "
                f"set parallelism.{needed} to true"
            )
    divisibility.require(Number("DP x CP", layout.dp * layout.cp, movable=False), by=[instances])


def global_batch(fields: Fields, layout: Layout, batch: Batch) -> None:
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
