"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) as transformers computes it.

megatron-core's MLASelfAttention with the rotary formulas of `bridge.models.modules.rope`, an epsilon of its own in the
norms of the two latents, and YaRN's factor on the softmax scale. It serves the local layers and Transformer Engine's.
"""

import copy
from typing import Any

import torch
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from bridge import platform
from bridge.models.mcore_config import MLAConfig
from bridge.models.modules import rope
from bridge.models.modules.rope import ScaledRotaryEmbedding


class LatentAttention(MLASelfAttention):
    """Self-attention whose queries, keys and values come out of low-rank latents.

    The configuration it works with is its own copy, because megatron-core's class and all modules below it take from
    there what here differs from the rest of the model.
    """

    def __init__(self, config: MLAConfig, *args: Any, **kwargs: Any) -> None:
        own = copy.copy(config)
        if config.latent_layernorm_epsilon is not None:
            own.layernorm_epsilon = config.latent_layernorm_epsilon  # no norm but the latents' is inside attention
        # megatron-core squares 0.1 * mscale_all_dim * ln(factor) + 1 into the softmax scale, as transformers does for
        # DeepSeek (yarn_apply_mscale): it stands for the logits' growth over all channels, the rotated or not.
        parameters = config.rope_parameters or {}
        if parameters.get("mscale_all_dim"):
            own.rotary_scaling_factor, own.mscale_all_dim = parameters["factor"], parameters["mscale_all_dim"]
        own.rope_type = "rope"  # the cheap one: GPT puts the model's own rotary embedding in its place
        super().__init__(own, *args, **kwargs)
        own.rope_type = "yarn"  # from here on: `rotary_pos_emb` gives angles and the factor on cos and sin
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            linear = getattr(self, name, None)
            if isinstance(linear, Linear):
                _as_megatron_would(linear, own)


def _as_megatron_would(linear: Linear, config: MLAConfig) -> None:
    """Bring a plain replicated layer, which knows nothing of either, to the platform's device and initialisation.

    Every tensor rank draws the same numbers: the default generator has one seed for all of them.
    """
    if linear.weight.is_meta:
        return
    if not config.use_cpu_initialization:
        linear.to(platform.device())
    if config.perform_initialization:
        config.init_method(linear.weight)


class LatentRotaryEmbedding(ScaledRotaryEmbedding):
    """Angles, and what cos and sin are multiplied by. Only some channels of a head are rotated here, so the factor
    cannot move into the softmax scale, where all other models have it."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """(angles in radians, float32 [sequence, 1, 1, channels], factor), for megatron-core to rotate with."""
        factor = rope.attention_factor(self.rope_parameters, max_sequence_length=self.max_sequence_length)
        return super().forward(*args, **kwargs), factor


def share_rotary_embedding(model: torch.nn.Module, embedding: LatentRotaryEmbedding) -> None:
    """Give every latent attention in `model` the same rotary embedding, whose angles are then computed once."""
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.rotary_pos_emb = embedding
