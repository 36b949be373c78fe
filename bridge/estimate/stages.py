"""Memory of the fullest process of each pipeline stage."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron.core.pipeline_parallel.schedules import get_schedule_table

from bridge import platform
from bridge.config import layout
from bridge.config.complete import Kind
from bridge.config.layout import Layout
from bridge.config.routing import Routed
from bridge.config.run_config import RunConfig
from bridge.estimate import activations, pieces, state
from bridge.estimate.activations import Head, Layer, Use
from bridge.estimate.pieces import Chunk, Pieces
from bridge.models import gpt

# What a GPU's memory holds besides tensors: about 0.5 GiB of CUDA context and kernels, and NCCL's buffers, which grow
# with the number of process groups.
OVERHEAD = 2 * 2**30


class Memory(NamedTuple):
    """Bytes on the fullest process of pipeline stage `stage`; `activations` at their peak, all else for the whole run.

    Processes of one stage differ only by the padding of the distributed optimizer's shards: experts, heads and channels
    are dealt evenly. The CUDA context and NCCL's buffers come on top.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


class Peak(NamedTuple):
    """Bytes when most are needed: `kept` by autograd, and all of them with gradients and what was sent on."""

    kept: float
    total: float


class Share(NamedTuple):
    """Bytes of one micro-batch in a chunk, without the loss: `kept` for its backward pass, and what is there besides
    while that runs, computed `again` and kept meanwhile, or `working`."""

    kept: float
    again: float
    working: float


def memory(config: RunConfig, *, world_size: int, fused: bool | None = None) -> list[Memory]:
    """Bytes per process, one entry per pipeline stage.

    `fused`: with Transformer Engine's kernels or without; None: as on this machine. Raises ConfigError when the model
    cannot be built or divided so.
    """
    routed = config.routed
    shape = layout.derive(routed, world_size=world_size)
    how = activations.use(
        routed,
        shape,
        sequence_length=config.data["sequence_length"],
        micro_batch_size=config.train.sequences_per_pass(shape.dp),
        fused=platform.has_transformer_engine() if fused is None else fused,
    )
    micro_batches = config.train.global_batch_size // (config.train.sequences_per_pass(shape.dp) * shape.dp)
    return of(routed, shape, how, micro_batches=micro_batches)


def of(routed: Routed, shape: Layout, how: Use, *, micro_batches: int) -> list[Memory]:
    """`memory` from parts; `micro_batches` per step."""
    model = pieces.of(routed, shape)
    layers = layers_of(model, how)
    found = []
    for stage, chunks in enumerate(pieces.chunks(model, routed.transformer, shape)):
        weights = [model.weights(chunk, stages=shape.pp, ep=shape.ep) for chunk in chunks]
        held = state.of(weights, routed, shape, first_stage=stage == 0)
        peak = activation_peak(model, routed, how, chunks, layers, stage=stage, micro_batches=micro_batches)
        most = max(peak.total, held.step)
        found.append(Memory(stage, held.weights, held.gradients, held.optimizer, int(most)))
    return found


def layers_of(model: Pieces, how: Use) -> dict[Kind, Layer]:
    """The activations of each kind of layer."""
    return {kind: activations.layer(model.config, how, **kind._asdict()) for kind in model.layers}


def activation_peak(
    model: Pieces,
    routed: Routed,
    how: Use,
    chunks: Sequence[Chunk],
    layers: Mapping[Kind, Layer],
    *,
    stage: int,
    micro_batches: int,
) -> Peak:
    """The activations of pipeline stage `stage`, which computes `chunks`."""
    shape, fields = how.shape, routed.transformer
    sizes = [_chunk(chunk, model, fields, how, layers) for chunk in chunks]
    group = fields.get("microbatch_group_size_per_vp_stage") or shape.pp
    live = _live(min(micro_batches, 4 * group), shape.pp, shape.vpp, group, stage)
    kept = max(sum(count * size.kept for count, size in zip(counts, sizes, strict=True)) for counts in live)
    again, working = max(size.again for size in sizes), max(size.again + size.working for size in sizes)
    loss = Head(0.0, 0.0)
    if chunks[-1].head:
        loss = activations.head(model.config, how, vocab=gpt.padded_vocab_size(routed))
    sent = 0.0
    if not fields.get("deallocate_pipeline_outputs"):
        # The schedule holds on to what it has sent to the next stage until its gradient comes back.
        sending = max(sum(n for n, chunk in zip(counts, chunks, strict=True) if not chunk.head) for counts in live)
        sent = sending * layers[model.kinds[0]].input
    return Peak(kept + max(loss.kept, again), kept + sent + max(loss.kept + loss.working, working))


def _chunk(chunk: Chunk, model: Pieces, fields: Mapping[str, Any], how: Use, layers: Mapping[Kind, Layer]) -> Share:
    own = [layers[model.kinds[index]] for index in chunk.layers]
    share = _recomputed(own, fields) if how.full else _stored(own)
    if not chunk.prediction:
        return share
    inside = activations.layer(model.config, how, **_last_kind(model)._asdict())
    module = activations.prediction(model.config, how, inside)
    kept = (model.config.mtp_num_layers or 0) * (2 * module.input if how.full else module.kept)
    again = max(share.again, module.kept + module.again if how.full else module.again)
    return Share(share.kept + kept, again, max(share.working, module.working))


def _last_kind(model: Pieces) -> Kind:
    """A prediction module's layer is like the last one, but has experts wherever the model has any."""
    return model.kinds[-1]._replace(experts=model.config.num_moe_experts is not None)


def _stored(layers: Sequence[Layer]) -> Share:
    again, working = (max((getattr(layer, name) for layer in layers), default=0.0) for name in ("again", "working"))
    return Share(sum(layer.kept for layer in layers), again, working)


def _recomputed(layers: Sequence[Layer], fields: Mapping[str, Any]) -> Share:
    """Full recomputation keeps one input for `recompute_num_layers` layers (method uniform), or of so many layers and
    all of the others (block)."""
    number = fields.get("recompute_num_layers") or 1
    if fields.get("recompute_method") == "block":
        groups, stored = [[layer] for layer in layers[:number]], sum(layer.kept for layer in layers[number:])
    else:
        groups, stored = [list(layers[start : start + number]) for start in range(0, len(layers), number)], 0.0
    inputs = sum(group[0].input for group in groups)
    if fields.get("distribute_saved_activations"):
        inputs /= fields.get("tensor_model_parallel_size", 1)
    most = max((sum(layer.kept + layer.again for layer in group) - group[0].input for group in groups), default=0.0)
    working = max((layer.working for layer in layers), default=0.0)
    # The stored layers come later in the model: they are free again when the first recomputation begins.
    return Share(inputs + stored, max(most - stored, 0.0), working)


@functools.lru_cache(maxsize=1024)
def _live(micro_batches: int, pp: int, vpp: int, group: int, stage: int) -> frozenset[tuple[int, ...]]:
    """How many forward passes of each chunk wait for their backward pass, at each peak of a step.

    1F1B, or interleaved (pipeline_parallel/schedules.py): forward passes up to `warm_up`, then one of each in turn. A
    few groups of micro-batches are enough to see all there is.
    """
    if vpp == 1:
        return frozenset({(min(micro_batches, pp - stage),)})
    order = [chunk for _, chunk in get_schedule_table(micro_batches, vpp, group)]
    warm_up = min(2 * (pp - stage - 1) + (vpp - 1) * group, len(order))
    counts, seen = [0] * vpp, set()
    for step, chunk in enumerate(order):
        counts[chunk] += 1
        seen.add(tuple(counts))
        if step >= warm_up:
            counts[vpp - 1 - order[step - warm_up]] -= 1
    return frozenset(seen)
