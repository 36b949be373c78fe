"""Models that megatron-core 0.16.1 does not let go of."""


def forget_models() -> None:
    """Empty the caches of rotary embeddings: with each of their last 32 models they keep its process groups, and of
    gloo's three threads each, one of which wakes a hundred times a second."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()
