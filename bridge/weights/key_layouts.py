"""Checkpoints of plain megatron-core under the keys used here: renamed, layers taken out of stacks, nothing read.

megatron-core has several ways to name one tensor. By default the layers of a block are stacked along a new first axis
(`decoder.layers.mlp.linear_fc2.weight` [layers, ...], transformer_block.sharded_state_dict). With its metadata
singleton_local_shards, experts have keys of their own and a gated fc1 is two tensors (apply_swiglu_sharded_factory).
A norm in front of a linear layer belongs to that layer with Transformer Engine's spec and stands alone in some local
ones; and a script may put all of it below a prefix. Here each layer has its own key, an expert is an entry `[3]` of its
layer's stack, and there is no prefix.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable

from bridge.errors import ConversionError
from bridge.weights import names
from bridge.weights.dist_files import DistFiles, StoredTensor
from bridge.weights.ledger import OPTIMIZER_PREFIXES
from bridge.weights.spec import TensorSpec

LAYERS = "decoder.layers."
_STACKED = re.compile(rf"{re.escape(LAYERS)}(?!\d)")
_EXPERT = re.compile(r"(\.experts\.experts)\.(\d+)\.(.+)")
# A norm by itself, and as a part of the linear layer behind it.
NORMS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    (".self_attention.q_layernorm.", ".self_attention.linear_q_up_proj.layer_norm_"),
    (".self_attention.kv_layernorm.", ".self_attention.linear_kv_up_proj.layer_norm_"),
)


def canonical(dist: DistFiles, *, wanted: Iterable[str] = ()) -> DistFiles:
    """`dist` under the keys used here. What has them already stays as it is, and so does what no rule knows.

    `wanted` are the model's own keys: they decide between a norm by itself and one that is part of a linear layer.
    Raises ConversionError when the tensors lie below several prefixes: then they are more than one model.
    """
    tensors = {key: stored for key, stored in dist.tensors.items() if not key.startswith(OPTIMIZER_PREFIXES)}
    others = {key: stored for key, stored in dist.tensors.items() if key not in tensors}
    prefix = _prefix(dist, tensors)
    tensors = {key.removeprefix(prefix): stored for key, stored in tensors.items()}
    tensors = _joined(tensors)
    tensors = _unstacked(dataclasses.replace(dist, tensors=tensors))
    tensors = {_EXPERT.sub(r"\1.\3[\2]", key): stored for key, stored in tensors.items()}
    return dataclasses.replace(dist, tensors=_with_norms(tensors, set(wanted)) | others)


def _prefix(dist: DistFiles, keys: Iterable[str]) -> str:
    prefixes = sorted({key.partition(LAYERS)[0] for key in keys if LAYERS in key})
    if len(prefixes) > 1:
        listed = ", ".join(repr(prefix) for prefix in prefixes)
        raise ConversionError(f"{dist.directory}: holds layers below {listed}; save one model per checkpoint")
    return prefixes[0] if prefixes else ""


def _joined(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Each pair `..._w`, `..._v` (gate and up) as one tensor, the first above the second."""
    joined = {}
    for key, stored in tensors.items():
        half, kind = key[:-2], key[-2:]
        if kind == "_v" and f"{half}_w" in tensors:
            continue
        other = tensors.get(f"{half}_v") if kind == "_w" else None
        joined[key if other is None else half] = stored if other is None else _above(stored, other)
    return joined


def _above(first: StoredTensor, second: StoredTensor) -> StoredTensor:
    dtype, (rows, *rest) = first.spec
    moved = tuple(chunk._replace(offsets=(chunk.offsets[0] + rows, *chunk.offsets[1:])) for chunk in second.chunks)
    return StoredTensor(TensorSpec(dtype, (rows + second.spec.shape[0], *rest)), first.chunks + moved)


def _unstacked(dist: DistFiles) -> dict[str, StoredTensor]:
    """Each tensor that holds all layers as one entry per layer."""
    tensors = {}
    for key, stored in dist.tensors.items():
        if not _STACKED.match(key) or not stored.spec.shape:
            tensors[key] = stored
            continue
        for layer in range(stored.spec.shape[0]):
            tensors[f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}"] = dist.stored(names.entry(key, layer))
    return tensors


def _with_norms(tensors: dict[str, StoredTensor], wanted: Collection[str]) -> dict[str, StoredTensor]:
    """`tensors` with norms renamed where the model has them in the other of the two places."""
    renamed = {}
    for key in wanted:
        for alone, fused in NORMS:
            other = key.replace(alone, fused) if alone in key else key.replace(fused, alone)
            if key not in tensors and other in tensors and other not in wanted:
                renamed[other] = key
    return {renamed.get(key, key): stored for key, stored in tensors.items()}
