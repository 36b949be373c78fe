"""Which modules a decoder layer is made of: Transformer Engine's where it runs, otherwise megatron-core's with our
attention and norm."""

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.models.core_attention import CoreAttention
from bridge.models.norm import Norm


class OwnBiasSelfAttention(SelfAttention):
    """Self-attention whose four projections have biases, or none, whatever `add_bias_linear` says of the MLP.

    megatron-core has one switch for all linear layers and one more for query, key and value; Hugging Face families have
    one for attention and one for the MLP.
    """

    def __init__(self, config: TransformerConfig, *args: Any, add_bias: bool, **kwargs: Any) -> None:
        own = copy.copy(config)
        own.add_bias_linear = own.add_qkv_bias = add_bias
        super().__init__(own, *args, **kwargs)


def block_spec(
    config: TransformerConfig, *, vp_stage: int | None = None, add_attention_bias: bool | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage. `add_attention_bias` None leaves attention's biases to add_bias_linear."""
    with_te = config.transformer_impl == "transformer_engine"
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=with_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    layers = {id(layer): layer for layer in spec.layer_specs}.values()  # equal layers share one spec object
    for layer in layers:
        if not with_te:
            _use_own_modules(layer)
        if add_attention_bias is not None:
            attention = layer.submodules.self_attention
            attention.module = OwnBiasSelfAttention
            attention.params = {**attention.params, "add_bias": add_attention_bias}
    if not with_te:
        spec.layer_norm = Norm
    return spec


def _use_own_modules(layer: ModuleSpec) -> None:
    """Put CoreAttention and Norm into a layer of megatron-core's local spec."""
    parts: Any = layer.submodules
    attention: Any = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    for holder, names in (
        (parts, ("input_layernorm", "pre_mlp_layernorm")),
        (attention, ("q_layernorm", "k_layernorm")),
    ):
        for name in names:
            if getattr(holder, name) is WrappedTorchNorm:
                setattr(holder, name, Norm)
