"""Which rotary embedding a GPT has: megatron-core's, a scaled one, one for latent attention, two by layer."""

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from bridge.models.mcore_config import MLAConfig
from bridge.models.modules.latent_attention import LatentRotaryEmbedding, share_rotary_embedding
from bridge.models.modules.local_rope import GlobalAndLocalRotary
from bridge.models.modules.rope import ScaledRotaryEmbedding


def place_rotary_embeddings(model: Any, *, rotary_base: float) -> None:
    """Replace the rotary embedding that GPTModel has built, where the model's config asks for another."""
    config = model.config
    shared = {
        "rotary_percent": model.rotary_percent,
        "rotary_interleaved": config.rotary_interleaved,
        "cp_group": model.pg_collection.cp,
    }
    scaled = {**shared, "rotary_base": rotary_base, "max_sequence_length": model.max_sequence_length}
    if isinstance(config, MLAConfig):
        parameters, channels = config.rope_parameters or {}, config.qk_pos_emb_head_dim
        share_rotary_embedding(model, LatentRotaryEmbedding(parameters, kv_channels=channels, **scaled))
    elif config.rope_parameters and model.position_embedding_type == "rope":
        model.rotary_pos_emb = ScaledRotaryEmbedding(config.rope_parameters, kv_channels=config.kv_channels, **scaled)
    if config.rope_local_base_freq is not None:
        local = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_base=config.rope_local_base_freq,
            use_cpu_initialization=True,
            **shared,
        )
        model.rotary_pos_emb = GlobalAndLocalRotary(model.rotary_pos_emb, local)
