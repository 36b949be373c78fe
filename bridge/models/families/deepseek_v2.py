"""DeepSeek-V2 and V2-Lite: latent attention, first layers dense, then shared experts beside those that a softmax score
chooses, within the best groups of them if the config says so."""

from collections.abc import Mapping
from typing import Any

from bridge.models.families.llama import CONSTANTS, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf import moe as hf_moe
from bridge.models.hf import moe_rows
from bridge.models.hf.decoder_rows import Rows, embedding, final
from bridge.models.hf.fields import Part, Values, activation, only, refused, same
from bridge.models.hf.latent import LATENT_CONSTANTS, latent_attention, latent_rope
from bridge.models.hf.latent_rows import latent_attention_rows
from bridge.weights.table import Table

DEEPSEEK_DEFAULTS = {**HF_DEFAULTS, "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 1536}
DEEPSEEK_DEFAULTS |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def sequence_loss() -> Part:
    """The balancing loss of DeepSeek's own code, per sequence or per batch; transformers' classes have none."""

    def read(hf: Values) -> dict[str, Any]:
        coefficient = float(hf.get("aux_loss_alpha") or 0.0)
        kind = "seq_aux_loss" if hf.get("seq_aux", True) else "aux_loss"
        return {"moe_aux_loss_coeff": coefficient, "moe_router_load_balancing_type": kind} if coefficient else {}

    def write(model: Values) -> dict[str, Any]:
        coefficient, kind = model["moe_aux_loss_coeff"], model["moe_router_load_balancing_type"]
        if not coefficient or isinstance(coefficient, list) or kind not in ("seq_aux_loss", "aux_loss"):
            return {}
        return {"aux_loss_alpha": float(coefficient), "seq_aux": kind == "seq_aux_loss"}

    keys = ("moe_aux_loss_coeff", "moe_router_load_balancing_type")
    return Part(("aux_loss_alpha", "seq_aux"), keys, read, write)


DEEPSEEK_PARTS = (
    same("num_hidden_layers", "num_layers"),
    same("hidden_size", "hidden_size"),
    same("intermediate_size", "ffn_hidden_size"),
    same("vocab_size", "vocab_size"),
    same("max_position_embeddings", "max_sequence_length"),
    same("tie_word_embeddings", "share_embeddings_and_output_weights", bool),
    latent_attention(),
    activation(),
    same("rms_norm_eps", "layernorm_epsilon", float),
    latent_rope(),
    same("attention_dropout", "attention_dropout", float),
    same("initializer_range", "init_method_std", float),
    hf_moe.experts("n_routed_experts"),
    same("moe_intermediate_size", "moe_ffn_hidden_size"),
    hf_moe.shared_experts(),
    hf_moe.layers_after_dense(),
    hf_moe.scaling(),
    sequence_loss(),
    only("moe_layer_freq", 1),
    only("ep_size", 1),
)
# The router computes in float32, as transformers' does whatever the model's dtype.
DEEPSEEK_CONSTANTS = {**CONSTANTS, **LATENT_CONSTANTS, "add_bias_linear": False, "moe_router_dtype": "fp32"}

GREEDY, LIMITED = "greedy", "group_limited_greedy"


def groups_by_method() -> Part:
    """Groups of experts, which count only under topk_method group_limited_greedy."""
    limited = hf_moe.groups(best=1)

    def read(hf: Values) -> dict[str, Any]:
        if hf["topk_method"] not in (GREEDY, LIMITED):
            raise refused("topk_method", hf["topk_method"], f"known are {GREEDY} and {LIMITED}")
        return limited.read(hf) if hf["topk_method"] == LIMITED else {}

    def write(model: Values) -> dict[str, Any]:
        return {"topk_method": LIMITED if model["moe_router_group_topk"] else GREEDY, **limited.write(model)}

    return Part(("topk_method", *limited.hf_names), limited.model_keys, read, write)


def deepseek_layer(model: Mapping[str, Any], *, fused_experts: bool = False) -> Rows:
    """The rows of a model's layers."""
    return [
        *latent_attention_rows(model),
        *moe_rows.mlp_norms(model),
        *moe_rows.dense_mlp(model),
        *moe_rows.router(model, fp32_weight=True),
        *moe_rows.experts(model, fused_experts=fused_experts),
        *moe_rows.shared_experts(model),
    ]


def v2_table(model: Mapping[str, Any], *, fused_experts: bool = False) -> Table:
    return Table([*embedding(model), *deepseek_layer(model, fused_experts=fused_experts), *final(model)])


FAMILY = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    hf_defaults={
        **DEEPSEEK_DEFAULTS,
        "max_position_embeddings": 2048,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "topk_method": GREEDY,
        "mlp_bias": False,
    },
    parts=(
        *DEEPSEEK_PARTS,
        groups_by_method(),
        only("norm_topk_prob", False),  # transformers ignores it
        only("scoring_func", "softmax"),
        only("mlp_bias", False),
    ),
    constants={**DEEPSEEK_CONSTANTS, "moe_router_pre_softmax": True},
    rows=v2_table,
    spellings={"fused_experts": lambda model: v2_table(model, fused_experts=True)},
)
