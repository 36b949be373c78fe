"""Model FLOPs: what the architecture needs per token, not what the hardware happens to execute."""

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge.config import complete
from bridge.config.complete import Kind


def per_token(config: TransformerConfig, *, vocab_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 N_mm + 3 L n_h (d_k + d_v) s.

    N_mm counts the weights a token is multiplied with: attention, MLP (of the experts, those a token visits, and the
    router) and the output layer, not the embedding look-up. The second term is attention's two products over the causal
    half of a sequence of s tokens, for L layers of n_h heads with keys of size d_k and values of size d_v. This is
    megatron-core's num_floating_point_operations for dense and MoE GPT models; recomputation is never counted. A module
    that predicts a further token is one more layer behind a projection, and uses the output layer once more.
    """
    modules = config.mtp_num_layers or 0
    like = Kind(
        experts=config.num_moe_experts is not None, groups=config.num_query_groups or 0, ffn=config.ffn_hidden_size
    )
    layers = [*complete.layers(vars(config)), *[like] * modules]
    weights = sum(_attention_weights(config, kind) + _mlp_weights(config, kind) for kind in layers)
    weights += config.hidden_size * vocab_size
    weights += modules * config.hidden_size * (2 * config.hidden_size + vocab_size)
    heads = config.num_attention_heads * sum(complete.head_widths(vars(config)))
    return 6.0 * weights + 3.0 * sum(kind.groups > 0 for kind in layers) * heads * sequence_length


def _attention_weights(config: TransformerConfig, kind: Kind) -> int:
    hidden, heads, widths = config.hidden_size, config.num_attention_heads, complete.head_widths(vars(config))
    if not kind.groups:
        return 0
    if not isinstance(config, MLATransformerConfig):
        key_value = kind.groups * sum(widths)
        return hidden * (heads * widths.key + key_value) + heads * widths.value * hidden
    queries, rank = heads * widths.key, config.q_lora_rank
    query = hidden * queries if rank is None else (hidden + queries) * rank
    down = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_head_dim + config.v_head_dim)
    return query + down + up + heads * widths.value * hidden


def _mlp_weights(config: TransformerConfig, kind: Kind) -> float:
    """Of an MLP; of a layer with experts those a token meets, and the router."""
    matrix = (3 if config.gated_linear_unit else 2) * config.hidden_size
    if not kind.experts:
        return matrix * kind.ffn
    assert config.moe_ffn_hidden_size is not None and config.num_moe_experts is not None
    width = config.moe_router_topk * config.moe_ffn_hidden_size + (config.moe_shared_expert_intermediate_size or 0)
    return matrix * width + config.hidden_size * config.num_moe_experts
