"""OLMo 2: Llama with norms behind each branch, not before it, and on queries and keys over all heads together."""

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, mlp, output_norms, qk_norms
from bridge.models.hf.fields import attention_and_mlp_bias, attention_shape
from bridge.weights.table import Table


def rows(model: Model) -> Table:
    behind = output_norms(model, attention="post_attention_layernorm", mlp="post_feedforward_layernorm")
    branches = [*qk_norms(model), *attention(model), *mlp(model)]
    return Table([*embedding(model), *behind, *branches, *final(model)])


FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    hf_defaults={**HF_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "attention_bias": False},
    parts=(*DECODER, attention_shape(has_head_dim=False), attention_and_mlp_bias(mlp_field=None)),
    constants={**CONSTANTS, "norm_placement": "post", "qk_layernorm_full_width": True},
    rows=rows,
)
