"""The sizes in a config.json: whole numbers within reason, checked before anything is listed or built by them."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from bridge.errors import ConversionError

# Field -> (least, most). The most is tens of times what any published model has; a wrong digit is far beyond.
_LAYERS, _HEADS, _EXPERTS = (1, 10_000), (1, 100_000), (1, 100_000)
_CHANNELS, _TOKENS, _PARTS = (1, 10_000_000), (1, 10**10), (0, 10_000)
SIZES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), _HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "moe_intermediate_size"), _CHANNELS),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), _CHANNELS),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "shared_expert_intermediate_size"), _CHANNELS),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), _TOKENS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), _EXPERTS),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_nextn_predict_layers"), _PARTS),
}
# Of these null says something in some families, or the field is worked out from others.
NULLABLE = """
num_key_value_heads head_dim n_inner q_lora_rank intermediate_size num_experts_per_tok n_shared_experts num_experts
moe_num_shared_experts num_nextn_predict_layers shared_expert_intermediate_size
"""
MAY_BE_NULL = frozenset(NULLABLE.split())


def check(hf: Mapping[str, Any], read: Collection[str]) -> None:
    """Raise ConversionError naming each of the fields `read` by a family that is not a size."""
    wrong = []
    for name, (least, most) in SIZES.items():
        value = hf.get(name)
        absent = name not in hf or (value is None and name in MAY_BE_NULL)
        if name in read and not absent and not (type(value) is int and least <= value <= most):
            wrong.append(f"{name}: {json.dumps(value)} ({least} to {most})")
    if wrong:
        raise ConversionError(f"config.json: {', '.join(wrong)}: a size is a whole number in its range")


def check_stored(section: Mapping[str, Any], shapes: Collection[tuple[int, ...]], *, source: object) -> None:
    """Raise ConversionError when a `model` section counts more layers or experts than files (`shapes` of all tensors)
    can hold, before a model of that many is laid out."""
    num_layers, num_experts = section["num_layers"], section.get("num_moe_experts") or 0
    if num_layers > len(shapes):
        raise ConversionError(f"config.json: {num_layers} layers, but {source} holds {len(shapes)} tensors; correct it")
    most = max(len(shapes), max((max(shape) for shape in shapes if shape), default=0))
    if num_experts > most:
        raise ConversionError(
            f"config.json: {num_experts} experts, but {source} holds {len(shapes)} tensors; correct it"
        )
