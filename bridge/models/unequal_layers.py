"""Layers of different sizes in one model, some without attention or without MLP, as architecture search finds them
(Puzzle: Bercovich et al. 2024, arXiv 2411.19146, of which the Llama-Nemotron models came).

Two lists with a number for each layer, `num_query_groups_by_layer` and `ffn_hidden_size_by_layer`; 0 leaves the branch,
and its norm, out of that layer. megatron-core builds each layer from a config of its own where
`heterogeneous_block_specs` says so; `LayerSizes` makes it.
"""

import copy
from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from bridge.config import complete
from bridge.errors import ConfigError, shown

GROUPS, WIDTHS = "num_query_groups_by_layer", "ffn_hidden_size_by_layer"
TP = "tensor_model_parallel_size"
# Fields whose modules take their sizes from the model's config, not from the layer's; and their harmless values.
REFUSED = {"num_moe_experts": None, "multi_latent_attention": False, "qk_layernorm_full_width": False}


class LayerSizes:
    """Mixed into the config: what megatron-core's block asks a config for when layers differ."""

    def get_config_for_layer(self, layer_number: int) -> Any:
        """A copy for layer `layer_number`, from 1, with its own numbers."""
        own: Any = copy.copy(self)
        own.num_query_groups = own.num_query_groups_by_layer[layer_number - 1] or own.num_query_groups
        own.ffn_hidden_size = own.ffn_hidden_size_by_layer[layer_number - 1] or own.ffn_hidden_size
        return own


def layer_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that follow from the two lists; none without them. Raises ConfigError."""
    if fields.get(GROUPS) is None and fields.get(WIDTHS) is None:
        return {}
    kinds, heads, tp = complete.layers(fields), fields["num_attention_heads"], fields.get(TP, 1)
    lists = {GROUPS: [kind.groups for kind in kinds], WIDTHS: [kind.ffn for kind in kinds]}
    for name, harmless in REFUSED.items():
        if fields.get(name, harmless) != harmless:
            raise ConfigError(
                f"model.{name}: {shown(fields[name])} needs equal layers; leave {GROUPS} and {WIDTHS} out"
            )
    for groups in filter(None, lists[GROUPS]):
        if heads % groups or (groups % tp and tp % groups):
            raise ConfigError(
                f"model.{GROUPS}: {groups} has to divide num_attention_heads, {heads}, and be a multiple or divisor of "
                f"{TP}, {tp}; set another number"
            )
    for width in lists[WIDTHS]:
        if width % tp:
            raise ConfigError(f"model.{WIDTHS}: {width} has to be a multiple of {TP}, {tp}; set another number")
    return {**lists, "heterogeneous_block_specs": True}


def leave_branches_out(layers: Sequence[ModuleSpec], config: Any, *, vp_stage: int | None) -> list[ModuleSpec]:
    """The specifications of this pipeline stage's layers, those without a branch each with one of its own."""
    if not config.heterogeneous_block_specs:
        return list(layers)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return [_own_spec(layer, config, index) for index, layer in enumerate(layers, first)]


def _own_spec(layer: ModuleSpec, config: Any, index: int) -> ModuleSpec:
    own = copy.copy(layer)
    own.submodules = parts = copy.copy(layer.submodules)
    if config.num_query_groups_by_layer[index] == 0:
        parts.input_layernorm = parts.self_attention = IdentityOp
        parts.self_attn_bda = IdentityFuncOp
    if config.ffn_hidden_size_by_layer[index] == 0:
        parts.pre_mlp_layernorm = parts.mlp = IdentityOp
        parts.mlp_bda = IdentityFuncOp
    return own
