"""Which modules a decoder layer is made of: Transformer Engine's where it runs, otherwise megatron-core's with our
attention and norm; and the pieces of some architectures that neither has."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from bridge.models import unequal_layers
from bridge.models.mcore_config import Config
from bridge.models.modules import expert_linear, full_width_norm, local_rope, router, scales
from bridge.models.modules.core_attention import CoreAttention
from bridge.models.modules.latent_attention import LatentAttention
from bridge.models.modules.norm import Norm
from bridge.models.modules.output_norm import place_norms


class OwnBiasSelfAttention(SelfAttention):
    """Self-attention whose output projection has a bias, or none, whatever `add_bias_linear` says of the MLP.

    Query, key and value have theirs with it, or without it by add_qkv_bias. megatron-core has one switch for all linear
    layers and one more for query, key and value; Hugging Face families have one for attention and one for the MLP.
    """

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        own = copy.copy(config)
        own.add_bias_linear = bool(config.add_attention_bias)
        super().__init__(own, *args, **kwargs)


def _own_bias(layer: ModuleSpec, config: Config) -> None:
    if config.add_attention_bias is not None:
        layer.submodules.self_attention.module = OwnBiasSelfAttention


def _latent_attention(layer: ModuleSpec, config: Config) -> None:
    if config.multi_latent_attention:
        layer.submodules.self_attention.module = LatentAttention


class ScaledRotation:
    """Mixed into a class of self-attention: multiplies the rotated channels of queries (Config.rotated_query_scale).

    Rotating is linear and mixes rotated channels only, so this is the same as larger cos and sin, in every kernel.
    """

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        query, *others = super().get_query_key_value_tensors(*args, **kwargs)  # type: ignore[misc]
        without_rope = self.config.no_rope_freq  # type: ignore[attr-defined]
        if without_rope and without_rope[self.layer_number - 1]:  # type: ignore[attr-defined]
            return (query, *others)
        channels, scale = self.config.rotated_query_scale  # type: ignore[attr-defined]
        query = torch.cat([query[..., :channels] * scale, query[..., channels:]], dim=-1)
        return (query, *others)


def _scaled_rotation(layer: ModuleSpec, config: Config) -> None:
    if getattr(config, "rotated_query_scale", None) is not None:
        attention = layer.submodules.self_attention
        attention.module = type("ScaledRotationSelfAttention", (ScaledRotation, attention.module), {})


def _capped_attention(layer: ModuleSpec, config: Config) -> None:
    """Transformer Engine's attention has no cap on the scores."""
    if config.attn_logit_softcapping is not None:
        layer.submodules.self_attention.submodules.core_attention = CoreAttention


# What an architecture changes in a layer's specification, local or Transformer Engine's; each does nothing unless the
# model has a key that asks for it.
VARIATIONS: tuple[Callable[[Any, Config], None], ...] = (
    _own_bias,
    _latent_attention,
    place_norms,
    full_width_norm.use,
    scales.scale_branches,
    _scaled_rotation,
    router.use,
    _capped_attention,
    local_rope.use,
    expert_linear.use,
)


def block_spec(config: Config, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage."""
    spec = get_gpt_decoder_block_spec(config, **_choices(config), vp_stage=vp_stage)
    for layer in {id(layer): layer for layer in spec.layer_specs}.values():  # equal layers share one spec object
        _adapt(layer, config)
    spec.layer_specs = unequal_layers.leave_branches_out(spec.layer_specs, config, vp_stage=vp_stage)
    if config.transformer_impl != "transformer_engine":
        spec.layer_norm = Norm
    return spec


def prediction_spec(config: Config, *, vp_stage: int | None = None) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token prediction modules of this pipeline stage; None where there are none.

    Their layer is like the last one of the model, with experts if the model has any.
    """
    if config.mtp_num_layers is None:
        return None
    with_experts = copy.copy(config)
    with_experts.moe_layer_freq = 1
    choices = _choices(config)
    layer = get_gpt_decoder_layer_specs(with_experts, **choices)[-1]
    with_te = choices["use_transformer_engine"]
    spec = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=with_te, vp_stage=vp_stage)
    _adapt(layer, config)
    if spec is not None and not with_te:
        for module in spec.layer_specs:
            norms: Any = module.submodules
            norms.enorm = norms.hnorm = norms.layer_norm = Norm
    return spec


def _choices(config: Config) -> dict[str, Any]:
    """What megatron-core's functions for specifications want to be told besides the configuration."""
    return {
        "use_transformer_engine": config.transformer_impl == "transformer_engine",
        "normalization": config.normalization,
        "qk_l2_norm": config.qk_l2_norm,
    }


def _adapt(layer: ModuleSpec, config: Config) -> None:
    if config.transformer_impl != "transformer_engine":
        _use_own_modules(layer)
        _use_common_keys(layer)
    for vary in VARIATIONS:
        vary(layer, config)


def _use_own_modules(layer: ModuleSpec) -> None:
    """Put CoreAttention and Norm into a layer of megatron-core's local spec."""
    parts: Any = layer.submodules
    attention: Any = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    if parts.self_attention.module is MLASelfAttention:
        # Replicated: divided over tensor ranks, as in megatron-core's local layers, the gradient of the keys' rotated
        # channels would lack the other ranks' part, without an error.
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    for holder, names in (
        (parts, ("input_layernorm", "pre_mlp_layernorm")),
        (attention, ("q_layernorm", "k_layernorm", "kv_layernorm")),
    ):
        for name in names:
            if getattr(holder, name, None) is WrappedTorchNorm:
                setattr(holder, name, Norm)


def _use_common_keys(layer: ModuleSpec) -> None:
    """Checkpoint keys of the norms of a local layer as Transformer Engine has them, which fuses a norm into the linear
    layer behind it, but has a router, or latent attention, behind a norm of its own."""
    parts: Any = layer.submodules
    keys = {}
    if parts.self_attention.module is MLASelfAttention:
        for latent in ("q", "kv"):
            keys[f"self_attention.{latent}_layernorm."] = f"self_attention.linear_{latent}_up_proj.layer_norm_"
    else:
        keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if parts.mlp.module is not MoELayer:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    parts.sharded_state_dict_keys_map = keys
