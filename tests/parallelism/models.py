"""Models of four layers or so that between them have what a layout can break."""

from typing import Any

from tests.training.runs import EXPERTS
from tests.training.runs import MODEL as SMALL

# Weights so large that attention is far from even: with the usual 0.02 its errors would drown in the rest of the loss.
MODEL = {**SMALL, "init_method_std": 0.2}

# Layers that differ, so that a stage which holds the wrong ones shows; the weight of embedding and output is one.
DENSE: dict[str, Any] = {
    **MODEL,
    "num_layers": 4,
    "share_embeddings_and_output_weights": True,
    "qk_layernorm": True,
    "window_size": [6, 0],
    "window_attn_skip_freq": [0, 1, 1, 0],
}
# Fewer key groups than tensor ranks; numbers of layers that divide only with embedding or loss counted.
ONE_GROUP = {**DENSE, "num_query_groups": 1, "share_embeddings_and_output_weights": False}
THREE_LAYERS = {**DENSE, "num_layers": 3, "window_attn_skip_freq": [0, 1, 0]}
SIX_LAYERS = {**DENSE, "num_layers": 6, "window_attn_skip_freq": [0, 1, 0, 1, 1, 0]}

_EXPERTS: dict[str, Any] = {**EXPERTS, **MODEL, "family": "qwen3_moe", "num_layers": 4, "moe_layer_freq": [0, 1, 0, 1]}
# The router of bridge.models.modules.router (softmax scores and a bias, as in ERNIE 4.5); every token to every rank.
ALLGATHER = {
    **_EXPERTS,
    "moe_router_score_function": "softmax",
    "moe_norm_min": 1e-12,
    "moe_token_dispatcher_type": "allgather",
}
# megatron-core's, balanced within each sequence.
ALLTOALL = {
    **_EXPERTS,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_token_dispatcher_type": "alltoall",
}
# Over all replicas: what one process computes of them in one micro-batch.
BALANCED_AS_A_WHOLE = {**ALLTOALL, "moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1.0}
# Latent attention alone, and with experts and a prediction module.
_LATENT = {
    "family": "deepseek_v3",
    "multi_latent_attention": True,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
}
_OTHER_HEADS = ("num_query_groups", "kv_channels")
LATENT_ALONE = {**{name: value for name, value in MODEL.items() if name not in _OTHER_HEADS}, **_LATENT}
LATENT: dict[str, Any] = {
    **{name: value for name, value in ALLTOALL.items() if name not in _OTHER_HEADS},
    **_LATENT,
    "moe_layer_freq": [0, 0, 0, 1],
    "mtp_num_layers": 1,
    "mtp_loss_scaling_factor": 0.1,
}
