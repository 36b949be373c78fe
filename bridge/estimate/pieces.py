"""What a model is made of: the weights of its embedding, of each of its layers and of its head, on one process.

Sizes come from megatron-core itself, from a model on the meta device that has one layer of each kind there is. So the
weights of any stage of any layout follow from one small build per size of the tensor-parallel groups.
"""

import copy
import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from bridge import parallel, platform
from bridge.config import complete
from bridge.config.complete import Kind
from bridge.config.layout import Layout
from bridge.config.routing import Routed
from bridge.models import gpt

# Fields with an entry for each layer, if they are lists.
BY_LAYER = (
    "moe_layer_freq",
    "num_query_groups_by_layer",
    "ffn_hidden_size_by_layer",
    "window_attn_skip_freq",
    "no_rope_freq",
    "cp_comm_type",
)
# What cuts a model into stages; the small model has one, and needs none of what goes with several.
CUTS = (
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "microbatch_group_size_per_vp_stage",
    "overlap_p2p_comm",
    "context_parallel_size",
    "hierarchical_context_parallel_sizes",
    "expert_model_parallel_size",
)


class Weight(NamedTuple):
    """A parameter on one process: numbers in it, bytes of each, and the number of its expert, from 0, if it is one's.
    `shared`: the embedding, which the last pipeline stage has as well when the output layer shares it."""

    size: int
    width: int
    expert: int | None = None
    shared: bool = False


class Sizes(NamedTuple):
    """Numbers in the weights outside the experts, and in those of the experts."""

    dense: int
    experts: int


class Chunk(NamedTuple):
    """What one process computes without interruption: a part of its layers, and what comes before and after them."""

    layers: tuple[int, ...]  # indices in the model
    embedding: bool
    final_norm: bool
    prediction: bool  # the modules that predict further tokens
    head: bool  # output layer and loss


@dataclass(frozen=True)
class Pieces:
    """The weights of one tensor-parallel rank that holds every expert, in the order of the model's parameters."""

    config: TransformerConfig  # of the small model: sizes of the real one, all but the number of layers
    embedding: tuple[Weight, ...]
    layers: dict[Kind, tuple[Weight, ...]]
    kinds: tuple[Kind, ...]  # of each layer of the real model
    norm: tuple[Weight, ...]
    prediction: tuple[Weight, ...]
    output: tuple[Weight, ...]  # empty: the output layer shares the embedding

    def weights(self, chunk: Chunk, *, stages: int, ep: int) -> list[Weight]:
        """Those of `chunk` on a process with every `ep`-th part of the experts, in the order of its parameters."""
        tied = not self.output
        embedding = self.embedding
        if tied and stages > 1:
            embedding = tuple(weight._replace(shared=index == 0) for index, weight in enumerate(embedding))
        found = list(embedding if chunk.embedding or chunk.prediction else ())
        for layer in chunk.layers:
            found += self._local(self.layers[self.kinds[layer]], ep)
        found += self.norm if chunk.final_norm else ()
        found += self._local(self.prediction, ep) if chunk.prediction else ()
        if chunk.head and tied and not (chunk.embedding or chunk.prediction):
            found.append(embedding[0])
        return found + list(self.output if chunk.head else ())

    def sizes(self, chunk: Chunk, *, ep: int) -> Sizes:
        """Of the same weights, without a list of them."""
        ends = [self.embedding] if chunk.embedding or chunk.prediction else []
        if chunk.head and (self.output or not ends):
            ends.append(self.output or self.embedding[:1])
        ends += [self.norm] if chunk.final_norm else []
        dense = sum(weight.size for part in ends for weight in part)
        experts = 0
        parts = [self._sums[self.kinds[layer]] for layer in chunk.layers]
        parts += [self._sums[None]] if chunk.prediction else []
        for part in parts:
            dense += part.dense
            experts += part.experts // ep
        return Sizes(dense, experts)

    @functools.cached_property
    def _sums(self) -> dict[Kind | None, Sizes]:
        parts: list[tuple[Kind | None, tuple[Weight, ...]]] = [*self.layers.items(), (None, self.prediction)]
        return {
            kind: Sizes(
                sum(weight.size for weight in weights if weight.expert is None),
                sum(weight.size for weight in weights if weight.expert is not None),
            )
            for kind, weights in parts
        }

    def _local(self, weights: Iterable[Weight], ep: int) -> list[Weight]:
        held = (self.config.num_moe_experts or 1) // ep
        return [weight for weight in weights if weight.expert is None or weight.expert < held]


def of(routed: Routed, shape: Layout) -> Pieces:
    """The pieces of the model for processes of layout `shape`. Raises ConfigError when it cannot be built."""
    kept = {name: value for name, value in routed.transformer.items() if name not in CUTS}
    sizes = {"tensor_model_parallel_size": shape.tp}
    if routed.transformer.get("num_moe_experts") is not None:
        sizes["expert_tensor_parallel_size"] = shape.etp
    return _built(_Key(replace(routed, transformer=kept | sizes)))


def small(routed: Routed) -> Routed:
    """`routed` without what only the machine of the real run can honour; none of it changes a weight."""
    fields = platform.honoured(routed.transformer)
    if "moe_act" in (modules := fields.get("recompute_modules") or ()):  # needs the grouped product
        fields["recompute_modules"] = [name for name in modules if name != "moe_act"]
    return replace(routed, transformer=fields)


class _Key:
    """A configuration as the key of a cache."""

    def __init__(self, routed: Routed) -> None:
        self.routed = routed
        self._text = repr((sorted(routed.transformer.items(), key=lambda item: item[0]), routed.gpt, routed.family))

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text


@functools.lru_cache(maxsize=64)
def _built(key: _Key) -> Pieces:
    routed = small(key.routed)
    fields = routed.transformer
    kinds = complete.layers(fields)
    different = list(dict.fromkeys(kinds))
    first = [kinds.index(kind) for kind in different]
    cut = {name: [fields[name][layer] for layer in first] for name in BY_LAYER if isinstance(fields.get(name), list)}
    if fields.get("num_moe_experts") is not None:
        cut["moe_layer_freq"] = [int(kind.experts) for kind in different]
    fields = fields | cut | {"num_layers": len(different)}
    world = math.lcm(fields["tensor_model_parallel_size"], fields.get("expert_tensor_parallel_size", 1))
    with parallel.fake(world, 0, fields), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that of experts on one rank with sequence parallelism
        (model,) = gpt.build(replace(routed, transformer=fields), meta=True)
    parts: dict[str, list[Weight]] = {}
    for name, parameter in model.named_parameters():
        weight = Weight(parameter.numel(), parameter.element_size(), _expert(name))
        parts.setdefault(_part(name), []).append(weight)
    layers = {kind: tuple(parts.get(f"layer {index}", ())) for index, kind in enumerate(different)}
    ends = {name: tuple(parts.get(name, ())) for name in ("embedding", "norm", "prediction", "output")}
    return Pieces(config=model.config, layers=layers, kinds=kinds, **ends)


def _part(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        return f"layer {words[2]}"
    return {"decoder": "norm", "mtp": "prediction", "output_layer": "output"}.get(words[0], "embedding")


def _expert(name: str) -> int | None:
    _, found, rest = name.partition(".local_experts.")
    return int(rest.split(".")[0]) if found else None


def chunks(model: Pieces, fields: dict[str, Any], shape: Layout) -> list[list[Chunk]]:
    """Every stage's chunks, one unless virtual stages are used. `fields` are the run's TransformerConfig fields."""
    config, num_layers = model.config, len(model.kinds)
    spelled = fields.get("pipeline_model_parallel_layout")
    if spelled is not None:
        return _spelled_chunks(config, spelled, shape)
    whole = copy.copy(config)
    whole.num_layers = num_layers
    whole.pipeline_model_parallel_size = shape.pp
    whole.virtual_pipeline_model_parallel_size = shape.vpp if shape.vpp > 1 else None
    for name in CUTS[3:7]:
        setattr(whole, name, fields.get(name) or getattr(TransformerConfig, name))
    stages: list[list[Chunk]] = []
    for stage in range(shape.pp):
        stages.append([])
        for index in range(shape.vpp):
            vp_stage = index if shape.vpp > 1 else None
            start = get_transformer_layer_offset(whole, vp_stage, stage)
            layers = range(start, start + get_num_layers_to_build(whole, vp_stage, stage))
            last = stage == shape.pp - 1 and index == shape.vpp - 1
            stages[-1].append(_chunk(layers, config, embedding=stage == index == 0, last=last, num_layers=num_layers))
    return stages


def _chunk(layers: Sequence[int], config: TransformerConfig, *, embedding: bool, last: bool, num_layers: int) -> Chunk:
    predicts = config.mtp_num_layers is not None
    norm = num_layers - 1 in layers if predicts else last
    return Chunk(tuple(layers), embedding=embedding, final_norm=norm, prediction=last and predicts, head=last)


def _spelled_chunks(config: TransformerConfig, spelled: Any, shape: Layout) -> list[list[Chunk]]:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    table = PipelineParallelLayerLayout(spelled, shape.pp).layout
    num_layers = sum(part.count(LayerType.decoder) for stage in table for part in stage)
    stages: list[list[Chunk]] = [[] for _ in range(shape.pp)]
    start = 0
    for index in range(shape.vpp):  # layers go through all stages before they come to a stage's next chunk
        for stage in range(shape.pp):
            part = table[stage][index]
            layers = range(start, start + part.count(LayerType.decoder))
            start = layers.stop
            last = LayerType.loss in part
            first = LayerType.embedding in part
            stages[stage].append(_chunk(layers, config, embedding=first, last=last, num_layers=num_layers))
    return stages
