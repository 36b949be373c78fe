"""GPT-OSS (20B, 120B): experts with biases and a clamped SwiGLU, attention sinks, a window in every other layer."""

from typing import Any

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import BOTH, HF, MCORE, Model, Rows, attention, embedding, final, linear, norms
from bridge.models.hf.fields import Part, Values, attention_shape, only, same, window_by_pattern
from bridge.models.hf.moe import aux_loss, experts, width_of_experts
from bridge.models.hf.moe_rows import EXPERTS, mlp_norms
from bridge.models.hf.rope import rope
from bridge.weights.ops import Copy, Interleaved, Transposed
from bridge.weights.table import Row, Table

# Where a config says nothing: https://huggingface.co/openai/gpt-oss-20b, and transformers' GptOssConfig.
SCALING = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def attention_bias() -> Part:
    """`attention_bias` on all four projections; experts and router always have theirs."""

    def read(hf: Values) -> dict[str, Any]:
        return {} if hf["attention_bias"] else {"add_attention_bias": False}

    def write(model: Values) -> dict[str, Any]:
        return {"attention_bias": model["add_attention_bias"] is not False}

    return Part(("attention_bias",), ("add_attention_bias",), read, write)


def rows(model: Model) -> Table:
    """An expert's matrices stand the other way round in the files, with gate and up of a channel side by side."""
    return Table(
        [
            *embedding(model),
            *norms(model, mlp=None),
            *mlp_norms(model),
            *attention(model),
            Row(MCORE + "self_attention.core_attention.softmax_offset", HF + "self_attn.sinks"),
            *linear(MCORE + "mlp.router.{0}", HF + "mlp.router.{0}", bias=True),
            *_experts(),
            *final(model),
        ]
    )


def _experts() -> Rows:
    ours, theirs = EXPERTS + "linear_fc{0}.{1}[{{expert}}]", HF + "mlp.experts.{0}_proj{1}[{{expert}}]"
    fc1, fc2 = Transposed(Interleaved()), Transposed(Copy())
    return [
        row
        for kind, suffix in zip(BOTH, ("", "_bias"), strict=True)
        for row in (
            Row(_name(ours, "1", kind), _name(theirs, "gate_up", suffix), fc1),
            Row(_name(ours, "2", kind), _name(theirs, "down", suffix), fc2),
        )
    ]


def _name(template: str, *filled: str) -> str:
    return template.format(*filled, layer="{layer}")


FAMILY = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    hf_defaults={
        **HF_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.001,
        "attention_bias": True,
    },
    parts=(
        *(part for part in DECODER if not {"intermediate_size", "hidden_act", "rope_theta"} & {*part.hf_names}),
        rope(theta=150000.0, scaling=SCALING),
        attention_shape(),
        attention_bias(),
        width_of_experts(),
        window_by_pattern(2, unused=128),
        experts("num_local_experts", "num_experts", per_token=("num_experts_per_tok", "experts_per_token")),
        same("swiglu_limit", "activation_func_clamp_value", float),
        only("swiglu_alpha", 1.702),
        only("hidden_act", "silu"),
        aux_loss(),
    ),
    constants={
        **CONSTANTS,
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
        "softmax_type": "learnable",
    },
    rows=rows,
)
