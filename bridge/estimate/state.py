"""Bytes of weights, gradients and optimizer state on the fullest data-parallel rank of a pipeline stage.

Follows megatron-core's DistributedDataParallel and its buffers (_ParamAndGradBuffer), and DistributedOptimizer, which
divides each bucket of a buffer evenly over the ranks.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bridge.config.layout import Layout
from bridge.config.routing import Routed
from bridge.estimate.pieces import Sizes, Weight

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
PARAMETER_ALIGNMENT = 64  # numbers; only with the distributed optimizer
BUCKET_ALIGNMENT = 128
BUCKET_ALIGNMENT_HIGH_BANDWIDTH = 2**16  # pad_buckets_for_high_nccl_busbw
SMALLEST_BUCKET = 40_000_000  # numbers; and at least BUCKET_PER_RANK for every data-parallel rank
BUCKET_PER_RANK = 1_000_000


class State(NamedTuple):
    """Bytes for the whole run, and those of gradients copied to 32 bits while the optimizer steps."""

    weights: int
    gradients: int
    optimizer: int
    step: int


class Sharing(NamedTuple):
    """Ranks over which gradients of a buffer are reduced; `shards` of them hold its optimizer state between them."""

    ranks: int  # without those of context parallelism: what the size of a bucket follows
    shards: int


class _Groups(NamedTuple):
    dense: Sharing
    experts: Sharing


def of(stage: Sequence[Sequence[Weight]], routed: Routed, shape: Layout, *, first_stage: bool) -> State:
    """The state of a process with the model chunks `stage`, on stage 0 (`first_stage`) or another one."""
    sharded = bool(routed.ddp.get("use_distributed_optimizer"))
    total = State(0, 0, 0, 0)
    for index, chunk in enumerate(stage):
        bucketed = bool(routed.ddp.get("overlap_grad_reduce")) and first_stage and index == 0
        for weights, group in _buffers(chunk, routed, shape):
            size = _bucket_size(routed, shape) if bucketed else None
            padded, held = _divided(weights, routed, group, bucket_size=size) if sharded else _whole(weights)
            total = State(*(a + b for a, b in zip(total, _bytes(routed, weights[0].width, padded, held), strict=True)))
    return total


def rough(sizes: Sequence[Sizes], routed: Routed, shape: Layout, *, width: int) -> State:
    """`of` without padding, for chunks of `sizes`, weights of `width` bytes: off by less than a thousandth."""
    sharded = bool(routed.ddp.get("use_distributed_optimizer"))
    dense, experts = (sum(part) for part in zip(*sizes, strict=True))
    groups = _groups(routed, shape)
    experts_group = groups.experts if shape.ep > 1 else groups.dense
    total = State(0, 0, 0, 0)
    for size, group in ((dense, groups.dense), (experts, experts_group)):
        held = size // group.shards if sharded else size
        total = State(*(a + b for a, b in zip(total, _bytes(routed, width, size, held), strict=True)))
    return total


def _groups(routed: Routed, shape: Layout) -> "_Groups":
    instances = routed.get("num_distributed_optimizer_instances")
    expert_ranks = shape.world_size // (shape.pp * shape.ep * shape.etp)
    return _Groups(Sharing(shape.dp, shape.dp * shape.cp // instances), Sharing(shape.dp, expert_ranks // instances))


def _buffers(chunk: Sequence[Weight], routed: Routed, shape: Layout) -> Iterable[tuple[list[Weight], Sharing]]:
    """Weights that share a buffer: those of one dtype, and experts apart if expert-parallel (layers.py:829)."""
    groups = _groups(routed, shape)
    for width in sorted({weight.width for weight in chunk}):
        same = [weight for weight in chunk if weight.width == width]
        apart = [weight for weight in same if weight.expert is not None and shape.ep > 1]
        others = [weight for weight in same if weight.expert is None or shape.ep == 1]
        yield from ((weights, group) for weights, group in ((others, groups.dense), (apart, groups.experts)) if weights)


def _bucket_size(routed: Routed, shape: Layout) -> int:
    return routed.ddp.get("bucket_size") or max(SMALLEST_BUCKET, BUCKET_PER_RANK * shape.dp)


def _whole(weights: Sequence[Weight]) -> tuple[int, int]:
    size = sum(weight.size for weight in weights)
    return size, size


def _divided(weights: Sequence[Weight], routed: Routed, group: Sharing, *, bucket_size: int | None) -> tuple[int, int]:
    """Numbers in the padded buffer, and those of weights on the rank that holds most of them."""
    high = BUCKET_ALIGNMENT_HIGH_BANDWIDTH if routed.ddp.get("pad_buckets_for_high_nccl_busbw") else 1
    alignment = math.lcm(group.shards, BUCKET_ALIGNMENT, high)
    held = [0] * group.shards
    total = 0
    for ranges in _buckets(weights, bucket_size):
        padded = _aligned(ranges[-1][1], alignment)
        total += padded
        _share(ranges, padded // group.shards, held)
    return total, max(held)


def _buckets(weights: Sequence[Weight], bucket_size: int | None) -> Iterable[list[tuple[int, int]]]:
    """Where each weight of a bucket begins and ends in it: from the last to the first, as backward finishes them."""
    bucket: list[tuple[int, int]] = []
    for weight in reversed(weights):
        if weight.shared and bucket:
            yield bucket
            bucket = []
        start = _aligned(bucket[-1][1], PARAMETER_ALIGNMENT) if bucket else 0
        bucket.append((start, start + weight.size))
        if weight.shared or (bucket_size is not None and bucket[-1][1] >= bucket_size):
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _share(ranges: Iterable[tuple[int, int]], shard: int, held: list[int]) -> None:
    """Add to `held` how much of each range lies in each rank's shard."""
    for start, end in ranges:
        for rank in range(start // shard, -(-end // shard)):
            held[rank] += min(end, (rank + 1) * shard) - max(start, rank * shard)


def _bytes(routed: Routed, width: int, padded: int, held: int) -> State:
    gradient = 4 if routed.ddp.get("grad_reduce_in_fp32") else width
    states, main = _optimizer_bytes(routed, width)
    # Without a 32-bit buffer the optimizer makes a 32-bit copy of its gradients (`shard_model_grad.float()`).
    copies = gradient < 4 and not routed.optimizer.get("use_precision_aware_optimizer")
    on_device = round(held * (1 - _offloaded_fraction(routed)))
    return State(padded * width, padded * gradient, on_device * (states + main), 4 * held if copies else 0)


def _offloaded_fraction(routed: Routed) -> float:
    """Of the numbers in optimizer state, those that stay in the CPU's memory."""
    return float(routed.get("optimizer_offload_fraction")) if routed.get("optimizer_cpu_offload") else 0.0


def _optimizer_bytes(routed: Routed, width: int) -> tuple[int, int]:
    """Bytes per number of Adam's two moments or SGD's one, and of the 32-bit copy of 16-bit weights.

    The precision-aware optimizer keeps each in a dtype of its own, and of a 32-bit copy of bf16 only the 16 bits that
    the weight itself lacks (optimizer_config.py, store_param_remainders).
    """
    aware = bool(routed.get("use_precision_aware_optimizer"))
    if routed.get("optimizer") == "sgd":
        moments = ["momentum"] if routed.get("sgd_momentum") else []
    else:
        moments = ["exp_avg_dtype", "exp_avg_sq_dtype"]
    states = sum(BYTES[routed.get(name)] if aware else 4 for name in moments)
    if width == 4:
        return states, 0
    main = BYTES[routed.get("main_params_dtype")]
    aware = aware and not routed.get("optimizer_cpu_offload")  # which has float32 of its own
    remainders = aware and routed.get("bf16") and routed.get("store_param_remainders")
    return states, 2 if remainders and main == 4 else main
