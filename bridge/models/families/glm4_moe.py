"""GLM-4.5, GLM-4.5-Air and GLM-4.6: half of each head rotated, and DeepSeek-V3's choice of experts and prediction."""

from functools import partial

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf import moe as hf_moe
from bridge.models.hf.fields import attention_shape, only, same
from bridge.models.hf.moe_rows import Model, moe_layer
from bridge.models.hf.prediction import multi_token_prediction, without_missing_predictions
from bridge.models.hf.prediction_rows import predicting_table
from bridge.models.hf.rope import HF_NAMES, rope
from bridge.weights.table import Table


def rows(model: Model, *, fused_experts: bool = False) -> Table:
    return predicting_table(model, partial(moe_layer, fused_experts=fused_experts, fp32_router=True))


FAMILY = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    hf_defaults={
        **HF_DEFAULTS,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "attention_bias": False,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "num_mtp_layers": 1,
    },
    parts=(
        *(part for part in DECODER if part.hf_names != HF_NAMES),
        rope(partial=0.5),
        attention_shape(has_head_dim=False),
        same("attention_bias", "add_qkv_bias", bool),
        same("use_qk_norm", "qk_layernorm", bool),
        hf_moe.experts("n_routed_experts", "num_local_experts"),
        same("moe_intermediate_size", "moe_ffn_hidden_size"),
        hf_moe.shared_experts(),
        hf_moe.layers_after_dense(),
        hf_moe.sigmoid_weights(),
        hf_moe.groups(best=2),
        hf_moe.scaling(),
        only("scoring_func", "sigmoid"),
        only("topk_method", "noaux_tc"),
        multi_token_prediction(),
    ),
    constants={
        **CONSTANTS,
        "add_bias_linear": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    },
    rows=rows,
    stored=without_missing_predictions,
    spellings={"fused_experts": partial(rows, fused_experts=True)},
)
