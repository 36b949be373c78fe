"""Nemotron-3, Nemotron-4 and Minitron: squared ReLU without a gate, LayerNorm times 1 + weight, half of the channels
rotated. (Llama-shaped Nemotrons are llama, hybrid ones nemotron_h.)"""

from bridge.models.families.llama import COMMON
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, mlp, norms
from bridge.models.hf.fields import activation, attention_and_mlp_bias, attention_shape, same
from bridge.models.hf.rope import rope
from bridge.weights.table import Table


def rows(model: Model) -> Table:
    up = mlp(model, fc1=("mlp.up_proj",))
    return Table([*embedding(model), *norms(model), *attention(model), *up, *final(model)])


FAMILY = Family(
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    hf_defaults={
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "initializer_range": 0.0134,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    },
    parts=(
        *COMMON,
        activation(),
        same("norm_eps", "layernorm_epsilon", float),
        rope(partial=0.5),
        attention_shape(),
        attention_and_mlp_bias(mlp_field="mlp_bias"),
    ),
    constants={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "gated_linear_unit": False,
        "hidden_dropout": 0.0,
    },
    rows=rows,
)
