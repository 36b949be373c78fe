"""StarCoder2: LayerNorm, biases everywhere, an MLP without a gate, a sliding window over all layers, tied weights."""

from bridge.models.families.llama import COMMON
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, mlp, norms
from bridge.models.hf.fields import activation, attention_shape, dropout, same, window_everywhere
from bridge.models.hf.rope import rope
from bridge.weights.table import Table


def rows(model: Model) -> Table:
    fc1_fc2 = mlp(model, fc1=("mlp.c_fc",), fc2="mlp.c_proj")
    return Table([*embedding(model), *norms(model), *attention(model), *fc1_fc2, *final(model)])


FAMILY = Family(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    hf_defaults={
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    parts=(
        *COMMON,
        activation(),
        same("norm_epsilon", "layernorm_epsilon", float),
        rope(),
        attention_shape(has_head_dim=False),
        same("use_bias", "add_bias_linear", bool),
        dropout("residual_dropout", "embedding_dropout"),
        window_everywhere(),
    ),
    constants={"normalization": "LayerNorm", "gated_linear_unit": False, "add_qkv_bias": False},
    rows=rows,
)
