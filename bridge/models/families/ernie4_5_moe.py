"""ERNIE 4.5 with experts (21B-A3B, 300B-A47B): ERNIE's attention, softmax scores with a bias that only the choice sees.

The modules of the published models that predict one more token (`model.mtp_*`) are left out only if config.json counts
0 of them: their output goes through the model's own last norm, where megatron-core's modules have a norm each.
"""

from collections.abc import Collection, Mapping
from typing import Any

from bridge.errors import ConversionError
from bridge.models.families import ernie4_5
from bridge.models.family import Family
from bridge.models.hf import moe_rows
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, norms
from bridge.models.hf.fields import Part, Values, attention_shape, only, refused, same
from bridge.models.hf.moe import aux_loss, experts, layers_between, shared_experts
from bridge.models.hf.prediction import MTP_NAMES, multi_token_prediction
from bridge.weights.ops import Flat
from bridge.weights.table import Ignore, Table

PREDICTIONS = MTP_NAMES[0]
OF_A_BLOCK = """input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj
self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"""
PREDICTION_TENSORS = (
    *(f"model.mtp_{name}.{{layer}}.weight" for name in ("emb_norm", "hidden_norm", "linear_proj")),
    *(f"model.mtp_block.{{layer}}.{name}.weight" for name in OF_A_BLOCK.split()),
)


def predictions() -> Part:
    """The modules that a config counts, in a field that transformers' class does not have."""

    def write(model: Values) -> dict[str, Any]:
        return {PREDICTIONS: model["mtp_num_layers"]} if model["mtp_num_layers"] else {}

    return multi_token_prediction()._replace(write=write)


def without_predictions(hf: Values, names: Collection[str]) -> Mapping[str, Any]:
    """`hf` without the count of modules that predict further tokens, where it is 0 or the files have none.

    Raises ConversionError where they have some: leaving them out is for the user to decide.
    """
    if hf.get(PREDICTIONS) != 0 and any(name.startswith("model.mtp_") for name in names):
        raise ConversionError(
            f"config.json: {PREDICTIONS}: {hf.get(PREDICTIONS)}, but the modules of this family that predict one more "
            "token (model.mtp_*) cannot be computed by megatron-core; set it to 0 to convert the model without them"
        )
    return {name: value for name, value in hf.items() if name != PREDICTIONS}


def rows(model: Model, *, fused_experts: bool = False) -> Table:
    """transformers' own names, with fused experts, have the correction bias at another place as well.

    Raises ConversionError for a model with modules that predict more tokens.
    """
    if model["mtp_num_layers"]:
        raise refused(
            "model.mtp_num_layers", model["mtp_num_layers"], "this family is converted without them; set null"
        )
    statics = "mlp.gate.moe_statics" if fused_experts else "mlp.moe_statics"
    return Table(
        [
            *embedding(model),
            *norms(model, mlp=None),
            *moe_rows.mlp_norms(model),
            *attention(model),
            *moe_rows.dense_mlp(model),
            *moe_rows.router(
                model, expert_bias=f"{statics}.e_score_correction_bias", expert_bias_op=Flat(), fp32_weight=True
            ),
            *moe_rows.experts(model, fused_experts=fused_experts),
            *moe_rows.shared_experts(model),
            *final(model),
            *(Ignore(name, "predicts one more token") for name in PREDICTION_TENSORS),
        ]
    )


FAMILY = Family(
    architecture="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    hf_defaults={
        **{name: value for name, value in ernie4_5.FAMILY.hf_defaults.items() if name != "head_dim"},
        "num_key_value_heads": 4,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "router_aux_loss_coef": 0.001,
    },
    parts=(
        *ernie4_5.DECODER_PARTS,
        attention_shape(has_head_dim=False),
        only("use_bias", False),  # would be there on the output layer as well, but not on experts
        experts("moe_num_experts", "num_experts", per_token=("moe_k", "num_experts_per_tok")),
        same("moe_intermediate_size", "moe_ffn_hidden_size"),
        shared_experts("moe_num_shared_experts", may_be_none=True),
        layers_between("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        same("moe_norm_min", "moe_norm_min", float),
        aux_loss(),
        predictions(),
    ),
    constants={
        **ernie4_5.FAMILY.constants,
        "add_bias_linear": False,
        "moe_router_pre_softmax": True,
        "norm_topk_prob": True,
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    },
    rows=rows,
    stored=without_predictions,
    spellings={"fused_experts": lambda model: rows(model, fused_experts=True)},
)
