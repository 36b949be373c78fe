"""The text of `plan=true`."""

from typing import Any

from bridge.config.run_config import RunConfig
from bridge.estimate.plan import Plan, cluster_of, overrides, plans
from bridge.estimate.report import gib, table

SHOWN = 10
SMALLEST_SHARE = 0.01  # of a step, for a cost to be named
HEADER = (
    *("#", "TP", "PP", "VPP", "CP", "EP", "ETP", "DP", "micro-batch", "recompute", "optimizer", "GiB", "s/step"),
    *("tokens/s/GPU", "beside computing"),
)


def report(config: RunConfig, *, world_size: int) -> str:
    """A table of the best layouts, and the overrides of the first. Raises ConfigError when none is legal or fits."""
    cluster = cluster_of(config, world_size=world_size)
    found = plans(config, cluster=cluster)
    nodes = f" in nodes of {cluster.per_node}" if world_size > cluster.per_node else ""
    length, train = config.data["sequence_length"], config.train
    lines = [
        f"GPUs          {world_size}{nodes}, {config.plan_memory_gib:g} GiB each",
        f"batch         {train.global_batch_size} sequences of {length} tokens per step",
        f"layouts       {min(len(found), SHOWN)} of {len(found)} that fit, by the estimated time of a step",
        *table([HEADER, *(_row(number, plan, config, world_size) for number, plan in enumerate(found[:SHOWN], 1))]),
        "overrides of the first:",
        "  " + (" ".join(f"{key}={_text(value)}" for key, value in overrides(found[0], config).items()) or "none"),
    ]
    return "\n".join(lines)


def _row(number: int, plan: Plan, config: RunConfig, world_size: int) -> tuple[str, ...]:
    shape, seconds = plan.shape, plan.costs.total
    sizes = (shape.tp, shape.pp, shape.vpp, shape.cp, shape.ep, shape.etp if shape.ep > 1 else 1, shape.dp)
    recompute = plan.fields.get("recompute_modules") or [plan.fields.get("recompute_granularity") or "-"]
    tokens = config.train.global_batch_size * config.data["sequence_length"] / seconds / world_size
    shares = {name: cost / seconds for name, cost in plan.costs._asdict().items() if name != "compute"}
    most = sorted(shares, key=lambda name: -shares[name])[:3]
    return (
        *(str(value) for value in (number, *sizes, plan.micro_batch_size)),
        ",".join(recompute),
        "sharded" if plan.fields["use_distributed_optimizer"] else "whole",
        gib(plan.memory),
        f"{seconds:.3g}",
        f"{tokens:,.0f}",
        ", ".join(f"{name} {shares[name]:.0%}" for name in most if shares[name] >= SMALLEST_SHARE) or "-",
    )


def _text(value: Any) -> str:
    """`value` as Hydra's command line reads it."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
