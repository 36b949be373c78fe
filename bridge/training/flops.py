"""Model FLOPs: what the architecture needs per token, not what the hardware happens to execute."""

from megatron.core.transformer.transformer_config import TransformerConfig


def per_token(config: TransformerConfig, *, vocab_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 N_mm + 6 L n_h d_h s.

    N_mm counts the weights a token is multiplied with: attention, MLP (of the experts, those a token visits, and the
    router) and the output layer, not the embedding look-up. The second term is attention's two products over the causal
    half of a sequence of s tokens, for L layers of n_h heads of size d_h. This is megatron-core's
    num_floating_point_operations for dense and MoE GPT models; recomputation is never counted.
    """
    hidden, query = config.hidden_size, config.num_attention_heads * config.kv_channels
    by_layer = getattr(config, "num_query_groups_by_layer", None) or [config.num_query_groups] * config.num_layers
    groups = [number for number in by_layer if number]  # 0: a layer without attention
    attention = sum(2 * hidden * (query + number * config.kv_channels) for number in groups)
    weights = attention + _mlp_weights(config) + hidden * vocab_size
    return 6.0 * weights + 6.0 * len(groups) * query * sequence_length


def _mlp_weights(config: TransformerConfig) -> float:
    matrices = 3 if config.gated_linear_unit else 2
    dense = matrices * config.hidden_size * config.ffn_hidden_size
    by_layer = getattr(config, "ffn_hidden_size_by_layer", None)
    if by_layer:
        return matrices * config.hidden_size * sum(by_layer)
    if config.num_moe_experts is None:
        return config.num_layers * dense
    expert = matrices * config.hidden_size * (config.moe_ffn_hidden_size or config.ffn_hidden_size)
    shared = matrices * config.hidden_size * (config.moe_shared_expert_intermediate_size or 0)
    router = config.hidden_size * config.num_moe_experts
    num_moe = sum(_moe_layers(config))
    return num_moe * (config.moe_router_topk * expert + shared + router) + (config.num_layers - num_moe) * dense


def _moe_layers(config: TransformerConfig) -> list[int]:
    """1 for a layer with experts, 0 for a dense one (megatron-core's moe_layer_freq: every n-th, or a list)."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [1 if layer % frequency == 0 else 0 for layer in range(config.num_layers)]
    return list(frequency)
