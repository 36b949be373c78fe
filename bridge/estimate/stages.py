"""Memory of the fullest process of each pipeline stage."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron.core.pipeline_parallel.schedules import get_schedule_table

from bridge import platform
from bridge.config import layout
from bridge.config.layout import Layout
from bridge.config.routing import Routed
from bridge.config.run_config import RunConfig
from bridge.estimate import activations, pieces, state
from bridge.estimate.activations import Layer, Use
from bridge.estimate.pieces import Chunk, Kind, Pieces
from bridge.models import gpt


class Memory(NamedTuple):
    """Bytes on the fullest process of pipeline stage `stage`; `activations` at their peak, all else for the whole run.

    Processes of one stage differ only by the padding of the distributed optimizer's shards: megatron-core deals experts,
    heads and channels evenly. The CUDA context and NCCL's buffers come on top.
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
    """Bytes kept by autograd when most are, and what else there is at a time in the step."""

    kept: float
    working: float


def memory(config: RunConfig, *, world_size: int, fused: bool | None = None) -> list[Memory]:
    """Bytes per process, one entry per pipeline stage.

    `fused`: with Transformer Engine's kernels or without; None: as on this machine. Raises ConfigError when the model
    cannot be built or divided so.
    """
    routed = config.routed()
    shape = layout.derive(routed, world_size=world_size)
    how = activations.use(
        routed,
        shape,
        sequence_length=config.data["sequence_length"],
        micro_batch_size=config.train.sequences_per_pass(shape.dp),
        fused=kernels(routed) if fused is None else fused,
    )
    micro_batches = config.train.global_batch_size // (config.train.sequences_per_pass(shape.dp) * shape.dp)
    return of(routed, shape, how, micro_batches=micro_batches)


def kernels(routed: Routed) -> bool:
    """True when a run on this machine would use Transformer Engine's."""
    return platform.has_transformer_engine() and routed.transformer.get("transformer_impl") != "local"


def of(routed: Routed, shape: Layout, how: Use, *, micro_batches: int) -> list[Memory]:
    """`memory` from parts; `micro_batches` per step."""
    model = pieces.of(routed, shape)
    found = []
    for stage, chunks in enumerate(pieces.chunks(model, routed.transformer, shape)):
        weights = [model.weights(chunk, stages=shape.pp, ep=shape.ep) for chunk in chunks]
        held = state.of(weights, routed, shape, first_stage=stage == 0)
        peak = activation_peak(model, routed, how, chunks, stage=stage, micro_batches=micro_batches)
        most = max(peak.kept + peak.working, held.step)
        found.append(Memory(stage, held.weights, held.gradients, held.optimizer, int(most)))
    return found


def activation_peak(
    model: Pieces, routed: Routed, how: Use, chunks: Sequence[Chunk], *, stage: int, micro_batches: int
) -> Peak:
    """The activations of pipeline stage `stage`, which computes `chunks`."""
    shape, fields = how.shape, routed.transformer
    layers = {kind: activations.layer(model.config, how, **kind._asdict()) for kind in model.layers}
    sizes = [_chunk(chunk, model, fields, how, layers) for chunk in chunks]
    group = fields.get("microbatch_group_size_per_vp_stage") or shape.pp
    live = _live(min(micro_batches, 4 * group), shape.pp, shape.vpp, group, stage)
    kept = max(sum(count * size.kept for count, size in zip(counts, sizes, strict=True)) for counts in live)
    working = max(size.working for size in sizes)
    if not fields.get("deallocate_pipeline_outputs"):
        # The schedule holds on to what it has sent to the next stage until its gradient comes back.
        sending = max(sum(n for n, chunk in zip(counts, chunks, strict=True) if not chunk.head) for counts in live)
        working += sending * layers[model.kinds[0]].input
    if chunks[-1].head:
        loss = activations.head(model.config, how, vocab=gpt.padded_vocab_size(routed))
        kept += loss.kept
        working = max(working - loss.kept, loss.working)
    return Peak(kept, working)


def _chunk(chunk: Chunk, model: Pieces, fields: Mapping[str, Any], how: Use, layers: Mapping[Kind, Layer]) -> Peak:
    """One micro-batch's share in a chunk, without the loss."""
    own = [layers[model.kinds[index]] for index in chunk.layers]
    kept, working = _recomputed(own, fields) if how.full else _stored(own)
    if chunk.prediction:
        inside = activations.layer(model.config, how, **_last_kind(model)._asdict())
        module = activations.prediction(model.config, how, inside)
        kept += (model.config.mtp_num_layers or 0) * (2 * module.input if how.full else module.kept)
        working = max(working, (module.kept if how.full else 0.0) + module.again + module.working)
    return Peak(kept, working)


def _last_kind(model: Pieces) -> Kind:
    """A prediction module's layer is like the last one, but has experts wherever the model has any."""
    return model.kinds[-1]._replace(experts=model.config.num_moe_experts is not None)


def _stored(layers: Sequence[Layer]) -> Peak:
    return Peak(sum(layer.kept for layer in layers), max((layer.again + layer.working for layer in layers), default=0.0))


def _recomputed(layers: Sequence[Layer], fields: Mapping[str, Any]) -> Peak:
    """Full recomputation keeps one input for `recompute_num_layers` layers (method uniform), or of so many layers and
    all of the others (block)."""
    number = fields.get("recompute_num_layers") or 1
    if fields.get("recompute_method") == "block":
        again, stored = layers[:number], layers[number:]
        groups = [[layer] for layer in again]
    else:
        groups, stored = [list(layers[start : start + number]) for start in range(0, len(layers), number)], []
    inputs = sum(group[0].input for group in groups)
    if fields.get("distribute_saved_activations"):
        inputs /= fields.get("tensor_model_parallel_size", 1)
    most = max((sum(layer.kept + layer.again for layer in group) for group in groups), default=0.0)
    working = max((layer.working for layer in layers), default=0.0)
    return Peak(inputs + sum(layer.kept for layer in stored), most + working)


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
