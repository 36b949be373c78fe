"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2's attention, softmax routing, and a shared expert behind a gate of its own."""

from functools import partial

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.families.qwen3_moe import MOE_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.fields import Values, attention_shape, same, window_by_layer
from bridge.models.hf.moe import aux_loss, experts, layers_by_step, shared_expert, softmax_weights
from bridge.models.hf.moe_rows import moe_table


def every_other_below(hf: Values) -> list[bool]:
    """Which layers have the window where `layer_types` does not say: every other one, of the first max_window_layers.

    As Qwen2MoeConfig has it; in Qwen2 it is those from max_window_layers on.
    """
    return [layer % 2 == 0 and layer < hf["max_window_layers"] for layer in range(hf["num_hidden_layers"])]


FAMILY = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    hf_defaults={
        **HF_DEFAULTS,
        **MOE_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
    },
    parts=(
        *DECODER,
        attention_shape(has_head_dim=False),
        same("qkv_bias", "add_qkv_bias", bool),
        window_by_layer(by_default=every_other_below),
        experts("num_experts"),
        same("moe_intermediate_size", "moe_ffn_hidden_size"),
        shared_expert(),
        layers_by_step(),
        softmax_weights(),
        aux_loss(),
    ),
    constants={**CONSTANTS, "add_bias_linear": False, "moe_shared_expert_gate": True, "moe_router_dtype": "fp32"},
    rows=partial(moe_table, shared="mlp.shared_expert"),
    spellings={"fused_experts": partial(moe_table, fused_experts=True, shared="mlp.shared_expert")},
)
