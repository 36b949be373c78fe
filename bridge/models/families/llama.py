"""Llama 1, 2, 3, 3.1-3.3 and the many models of its shape."""

from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import activation, attention_and_mlp_bias, attention_shape, same
from bridge.models.hf.rope import rope

# Fields of nearly every decoder.
COMMON = (
    same("num_hidden_layers", "num_layers"),
    same("hidden_size", "hidden_size"),
    same("intermediate_size", "ffn_hidden_size"),
    same("vocab_size", "vocab_size"),
    same("max_position_embeddings", "max_sequence_length"),
    same("tie_word_embeddings", "share_embeddings_and_output_weights", bool),
    same("attention_dropout", "attention_dropout", float),
    same("initializer_range", "init_method_std", float),
)
# Fields of every decoder of this shape, and what megatron-core builds for all of them.
SHAPE_AND_TRAINING = (*COMMON, same("rms_norm_eps", "layernorm_epsilon", float))
DECODER = (*SHAPE_AND_TRAINING, activation(), rope())
CONSTANTS = {"normalization": "RMSNorm", "gated_linear_unit": True, "hidden_dropout": 0.0}
HF_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    hf_defaults={**HF_DEFAULTS, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    parts=(*DECODER, attention_shape(), attention_and_mlp_bias(mlp_field="mlp_bias")),
    constants=CONSTANTS,
    rows=llama_table,
)
