"""Model keys that megatron-core does not have: pieces of architectures it cannot build by itself.

They join the fields of megatron-core's TransformerConfig (`bridge.models.mcore_config`), so every module of a model can
read them from its `config`. Each one's default means "as megatron-core does it". Plain types: no torch here.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from bridge.config.annotation import of_dataclass_field


@dataclass
class OwnFields:
    """Names are those of Hugging Face configs where these have one."""

    # Biases on the four projections of attention; None: as add_bias_linear and add_qkv_bias say.
    add_attention_bias: bool | None = None
    # rope_type and the parameters of that type (bridge.models.modules.rope); None: plain rotary embedding.
    rope_parameters: dict[str, Any] | None = None
    # Added to the mean square in the norms of the latents (multi_latent_attention); None: layernorm_epsilon.
    latent_layernorm_epsilon: float | None = None
    # Norm before each branch (attention, MLP), after it, or both; always inside the residual connection.
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    # Best experts of a group whose scores add up to the group's; None: moe_router_topk // moe_router_group_topk.
    moe_router_group_score_topk: int | None = None
    # Weights of a token's experts are divided by their sum; None: softmax does unless moe_router_pre_softmax, sigmoid
    # does unless moe_router_topk is 1.
    norm_topk_prob: bool | None = None
    # Least sum to divide them by; None: 1e-20 is added to the sum.
    moe_norm_min: float | None = None
    # RMSNorm of queries and of keys over all heads together, instead of qk_layernorm, which is for each head.
    qk_layernorm_full_width: bool = False
    # num_query_groups and ffn_hidden_size of each layer where they differ; 0: no attention, no MLP. None: all equal.
    num_query_groups_by_layer: list[int] | None = None
    ffn_hidden_size_by_layer: list[int] | None = None
    # What the embedding of a token is multiplied by; the output layer is not, though it may share the weight.
    embedding_multiplier: float = 1.0
    # Attention scores and logits are bent into (-cap, cap) by cap * tanh(x / cap); None: not at all.
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    # Base of the rotary embedding, without scaling, of the layers that have the window; None: that of all layers.
    rope_local_base_freq: int | None = None
    # What the output of attention and of the MLP is multiplied by before it is added to the residual stream.
    residual_multiplier: float = 1.0
    # What the logits are divided by.
    logits_scaling: float = 1.0
    # How Transformer Engine overlaps each matrix product with its communication (tp_comm_overlap): product -> options
    # of its initialize_ub. The only one of these keys that belongs to the section parallelism.
    tp_comm_overlap_cfg: dict[str, Any] | None = None


def annotations() -> dict[str, str]:
    """Field -> the text of its type, as `bridge.config.annotation` reads it."""
    return {field.name: of_dataclass_field(field.type) for field in fields(OwnFields)}


def defaults() -> dict[str, Any]:
    """Field -> its default."""
    return {field.name: field.default for field in fields(OwnFields)}
