"""Mixtral (8x7B, 8x22B): Mistral's attention and experts in every layer, chosen by a softmax over the chosen alone."""

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, norms
from bridge.models.hf.fields import attention_shape, window_everywhere
from bridge.models.hf.moe import aux_loss, experts, jitter, softmax_weights, width_of_experts
from bridge.models.hf.moe_rows import experts as expert_rows
from bridge.models.hf.moe_rows import mlp_norms, moe_table, router
from bridge.models.hf.rope import HF_NAMES, rope
from bridge.weights.table import Table

# w1 is the gate, w3 what it multiplies, w2 the projection back.
FC1 = ("block_sparse_moe.experts.{expert}.w1.{0}", "block_sparse_moe.experts.{expert}.w3.{0}")
FC2 = "block_sparse_moe.experts.{expert}.w2.{0}"
WIDTH = ("intermediate_size",)  # here that of an expert


def rows(model: Model) -> Table:
    """The names in files; transformers' own, which it may write, are those of most families, with fused experts."""
    return Table(
        [
            *embedding(model),
            *norms(model, mlp=None),
            *mlp_norms(model),
            *attention(model),
            *router(model, weight="block_sparse_moe.gate.weight"),
            *expert_rows(model, fc1=FC1, fc2=FC2),
            *final(model),
        ]
    )


FAMILY = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    hf_defaults={
        **HF_DEFAULTS,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    },
    parts=(
        *(part for part in DECODER if part.hf_names not in (HF_NAMES, WIDTH)),
        rope(theta=1000000.0),
        attention_shape(),
        window_everywhere(),
        width_of_experts(),
        experts("num_local_experts", "num_experts"),
        softmax_weights(None),
        jitter(),
        aux_loss(),
    ),
    constants={**CONSTANTS, "add_bias_linear": False, "add_qkv_bias": False, "moe_router_dtype": "fp32"},
    rows=rows,
    spellings={"fused_experts": lambda model: moe_table(model, fused_experts=True)},
)
