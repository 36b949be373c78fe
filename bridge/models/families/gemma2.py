"""Gemma 2: Gemma with norms on both sides of each branch, soft caps, and a window in every other layer."""

from typing import Any

from bridge.models.families import gemma
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, mlp, norms, output_norms, qk_norms
from bridge.models.hf.fields import Part, Values, activation, optional, refused, unread, window_by_pattern
from bridge.models.hf.rope import rope
from bridge.weights.table import Table


def query_scale() -> Part:
    """`query_pre_attn_scalar`, to whose root queries are in proportion: megatron-core's softmax_scale ** -2."""

    def read(hf: Values) -> dict[str, Any]:
        scalar = hf["query_pre_attn_scalar"]
        return {} if scalar == hf["head_dim"] else {"softmax_scale": scalar**-0.5}

    def write(model: Values) -> dict[str, Any]:
        scale = model["softmax_scale"]
        scalar = model["kv_channels"] if scale is None else round(scale**-2)
        if scale is not None and scalar**-0.5 != scale:
            raise refused("model.softmax_scale", scale, "it needs to be 1 / sqrt of a whole number")
        return {"query_pre_attn_scalar": scalar}

    return Part(("query_pre_attn_scalar",), ("softmax_scale",), read, write)


def table(model: Model) -> Table:
    """The weight table of Gemma 2 and 3: four norms in a layer."""
    before = norms(model, mlp="pre_feedforward_layernorm")
    behind = output_norms(model, attention="post_attention_layernorm", mlp="post_feedforward_layernorm")
    branches = [*qk_norms(model), *attention(model), *mlp(model)]
    return Table([*embedding(model), *before, *behind, *branches, *final(model)])


PARTS = (
    *gemma.PARTS,
    activation("hidden_activation"),
    unread("hidden_act"),
    query_scale(),
    optional("final_logit_softcapping", "final_logit_softcapping"),
)
CONSTANTS = {**gemma.CONSTANTS, "norm_placement": "sandwich"}
DEFAULTS = {
    **gemma.DEFAULTS,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    hf_defaults={**DEFAULTS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    parts=(
        *PARTS,
        optional("attn_logit_softcapping", "attn_logit_softcapping"),
        rope(),
        window_by_pattern(2, unused=4096),
    ),
    constants=CONSTANTS,
    rows=table,
)
