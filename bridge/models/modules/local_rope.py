"""Another rotary embedding for the layers with a sliding window than for those without (Gemma 3, arXiv 2503.19786).

megatron-core computes one tensor of angles per forward pass and hands it to every layer. Here it holds both kinds, one
beside the other in a new first dimension, and each layer takes its own: a tensor as before, so that recomputation,
pipeline stages and the key-value cache need not know.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from bridge.errors import ConfigError

GLOBAL, LOCAL = 0, 1


class GlobalAndLocalRotary(torch.nn.Module):
    """Angles of two rotary embeddings in radians, [2, sequence, 1, 1, rotated channels], in the order of GLOBAL, LOCAL.

    Called as megatron-core's RotaryEmbedding, by GPTModel.
    """

    def __init__(self, everywhere: RotaryEmbedding, windowed: RotaryEmbedding) -> None:
        super().__init__()
        self.everywhere, self.windowed = everywhere, windowed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([self.everywhere(*args, **kwargs), self.windowed(*args, **kwargs)])

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return self.everywhere.get_rotary_seq_len(*args, **kwargs)


class OwnRotary:
    """Mixed into a class of self-attention: from both kinds of angles it takes those of its layer."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        config: Any = self.config  # type: ignore[attr-defined]
        number = self.layer_number  # type: ignore[attr-defined]
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, number)
        own = rotary_pos_emb[LOCAL if windowed else GLOBAL]
        return super().forward(*args, rotary_pos_emb=own, **kwargs)  # type: ignore[misc]


def use(layer: ModuleSpec, config: Any) -> None:
    """Change a layer's specification where `rope_local_base_freq` is set. Raises ConfigError for latent attention."""
    if config.rope_local_base_freq is None:
        return
    if config.multi_latent_attention:
        raise ConfigError(
            f"model.rope_local_base_freq: {config.rope_local_base_freq} has no effect with multi_latent_attention; "
            "leave it out"
        )
    attention: Any = layer.submodules.self_attention
    attention.module = type("OwnRotarySelfAttention", (OwnRotary, attention.module), {})
