"""Model FLOPs: what the architecture needs per token, not what the hardware happens to execute."""

from typing import NamedTuple

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


def per_token(config: TransformerConfig, *, vocab_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 N_mm + 3 L n_h (d_k + d_v) s.

    N_mm counts the weights a token is multiplied with: attention, MLP (of the experts, those a token visits, and the
    router) and the output layer, not the embedding look-up. The second term is attention's two products over the causal
    half of a sequence of s tokens, for L layers of n_h heads with keys of size d_k and values of size d_v. This is
    megatron-core's num_floating_point_operations for dense and MoE GPT models; recomputation is never counted. A module
    that predicts a further token is one more layer behind a projection, and uses the output layer once more.
    """
    modules = config.mtp_num_layers or 0
    by_layer = getattr(config, "num_query_groups_by_layer", None) or [config.num_query_groups] * config.num_layers
    groups = [number for number in by_layer if number]  # 0: a layer without attention
    groups += [config.num_query_groups] * modules
    weights = sum(_attention_weights(config, number) for number in groups)
    weights += _mlp_weights(config) + config.hidden_size * vocab_size
    weights += modules * config.hidden_size * (2 * config.hidden_size + vocab_size)
    widths = _head_widths(config)
    heads = config.num_attention_heads * (widths.key + widths.value)
    return 6.0 * weights + 3.0 * len(groups) * heads * sequence_length


class _Widths(NamedTuple):
    """Channels of a head: of a query or key, and of a value."""

    key: int
    value: int


def _head_widths(config: TransformerConfig) -> _Widths:
    if isinstance(config, MLATransformerConfig):
        return _Widths(config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim)
    assert config.kv_channels is not None
    return _Widths(config.kv_channels, config.kv_channels)


def _attention_weights(config: TransformerConfig, num_query_groups: int) -> int:
    hidden, heads, widths = config.hidden_size, config.num_attention_heads, _head_widths(config)
    if not isinstance(config, MLATransformerConfig):
        key_value = num_query_groups * (widths.key + widths.value)
        return hidden * (heads * widths.key + key_value) + heads * widths.value * hidden
    queries, rank = heads * widths.key, config.q_lora_rank
    query = hidden * queries if rank is None else (hidden + queries) * rank
    down = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_head_dim + config.v_head_dim)
    return query + down + up + heads * widths.value * hidden


def _mlp_weights(config: TransformerConfig) -> float:
    matrices, modules = 3 if config.gated_linear_unit else 2, config.mtp_num_layers or 0
    dense = matrices * config.hidden_size * config.ffn_hidden_size
    by_layer = getattr(config, "ffn_hidden_size_by_layer", None)
    if by_layer:
        return matrices * config.hidden_size * sum(by_layer)
    if config.num_moe_experts is None:
        return (config.num_layers + modules) * dense
    expert = matrices * config.hidden_size * (config.moe_ffn_hidden_size or config.ffn_hidden_size)
    shared = matrices * config.hidden_size * (config.moe_shared_expert_intermediate_size or 0)
    router = config.hidden_size * config.num_moe_experts
    num_moe = sum(_moe_layers(config))
    with_experts = config.moe_router_topk * expert + shared + router
    return (num_moe + modules) * with_experts + (config.num_layers - num_moe) * dense


def _moe_layers(config: TransformerConfig) -> list[int]:
    """1 for a layer with experts, 0 for a dense one (megatron-core's moe_layer_freq: every n-th, or a list)."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [1 if layer % frequency == 0 else 0 for layer in range(config.num_layers)]
    return list(frequency)
