"""DeepSeek-V3, V3.1 and R1, and models of their shape such as Moonlight: latent attention, experts chosen by a sigmoid
score with a bias that only the choice sees, and modules that predict one more token each."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from bridge.models.families.deepseek_v2 import DEEPSEEK_CONSTANTS, DEEPSEEK_DEFAULTS, DEEPSEEK_PARTS, deepseek_layer
from bridge.models.family import Family
from bridge.models.hf import moe as hf_moe
from bridge.models.hf.fields import only
from bridge.models.hf.prediction import multi_token_prediction, without_missing_predictions
from bridge.models.hf.prediction_rows import predicting_table
from bridge.weights.table import Table

V3_DEFAULTS = {
    **DEEPSEEK_DEFAULTS,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "num_key_value_heads": 128,
    "rope_interleave": True,
    "num_mtp_layers": 1,
}
V3_PARTS = (
    *DEEPSEEK_PARTS,
    hf_moe.sigmoid_weights(),
    hf_moe.groups(best=2),
    # transformers' class has no such fields; serving engines look for them.
    only("scoring_func", "sigmoid", written=True),
    only("topk_method", "noaux_tc", written=True),
    multi_token_prediction(),
)
V3_CONSTANTS = {
    **DEEPSEEK_CONSTANTS,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}


def v3_table(model: Mapping[str, Any], *, fused_experts: bool = False) -> Table:
    return predicting_table(model, partial(deepseek_layer, fused_experts=fused_experts))


FAMILY = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    hf_defaults=V3_DEFAULTS,
    parts=V3_PARTS,
    constants=V3_CONSTANTS,
    rows=v3_table,
    stored=without_missing_predictions,
    spellings={"fused_experts": partial(v3_table, fused_experts=True)},
)
