"""Llama-Nemotron (Super 49B, Ultra 253B): Llama with layers of unequal sizes, some without attention or without MLP.

The class, DeciLM, ships with the files; transformers has none. In it `n_heads_in_group` query heads share keys and
values, and the MLP's width is 2/3 of `ffn_mult` times the hidden size, rounded down to a whole number and then up to a
multiple of 256.
"""

from typing import Any

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import Part, Values, attention_and_mlp_bias, refused

MULTIPLE = 256
# The class sets these to null; what they would say is in block_configs.
NULL = ("num_key_value_heads", "intermediate_size")
GROUPS, WIDTHS = "num_query_groups_by_layer", "ffn_hidden_size_by_layer"


def block_configs() -> Part:
    """`block_configs`, the attention and the ffn of each layer. Only sizes and no_op are understood."""

    def read(hf: Values) -> dict[str, Any]:
        heads, blocks, width = hf["num_attention_heads"], hf["block_configs"], hf["hidden_size"]
        for name in NULL:
            if hf.get(name) is not None:
                raise refused(name, hf[name], "block_configs says it for each layer; set null")
        if hf.get("head_dim") not in (None, width // heads):
            raise refused("head_dim", hf["head_dim"], "it is hidden_size / num_attention_heads in this family")
        if not isinstance(blocks, list) or len(blocks) != hf["num_hidden_layers"]:
            raise refused("block_configs", blocks, f"it needs an entry for each of {hf['num_hidden_layers']} layers")
        shared = [_number(block, "attention", "n_heads_in_group") for block in blocks]
        groups = [_groups(heads, number) if number else 0 for number in shared]
        widths = [ffn_width(_number(block, "ffn", "ffn_mult") or 0.0, width) for block in blocks]
        # The numbers for the model as a whole are the narrowest attention and the widest MLP.
        whole = {"num_query_groups": min(filter(None, groups), default=heads), "ffn_hidden_size": max(widths)}
        channels = {"num_attention_heads": heads, "kv_channels": width // heads}
        return {**channels, **whole, GROUPS: groups, WIDTHS: widths}

    def write(model: Values) -> dict[str, Any]:
        heads, layers, hidden = model["num_attention_heads"], model["num_layers"], model["hidden_size"]
        if model["kv_channels"] != hidden // heads:
            raise refused("model.kv_channels", model["kv_channels"], "it is hidden_size / heads in this family")
        groups = model[GROUPS] or [model["num_query_groups"]] * layers
        widths = model[WIDTHS] or [model["ffn_hidden_size"]] * layers
        for size in widths:
            if size % MULTIPLE:
                raise refused(f"model.{WIDTHS}", size, f"every width is a multiple of {MULTIPLE} in this family")
        blocks = [
            {
                "attention": _block("n_heads_in_group", heads // group if group else None),
                "ffn": _block("ffn_mult", 3 * size / (2 * hidden) if size else None),
            }
            for group, size in zip(groups, widths, strict=True)
        ]
        return {"num_attention_heads": heads, "block_configs": blocks, **dict.fromkeys(NULL)}

    hf_names = ("num_attention_heads", "block_configs", "head_dim", *NULL)
    keys = ("num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", GROUPS, WIDTHS)
    return Part(hf_names, keys, read, write)


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """The MLP's width: 2/3 of ffn_mult x hidden_size, rounded down, then up to a multiple of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // MULTIPLE) * MULTIPLE


def _groups(heads: int, heads_in_group: int) -> int:
    if heads_in_group < 1 or heads % heads_in_group:
        raise refused("block_configs", heads_in_group, f"n_heads_in_group has to divide num_attention_heads, {heads}")
    return heads // heads_in_group


def _number(block: Values, branch: str, field: str) -> Any:
    """A branch's `field`, None where no_op leaves the branch out. Raises ConversionError for any other setting."""
    given = dict(block.get(branch) or {})
    value, left_out = given.pop(field, None), given.pop("no_op", False)
    others = {f"{branch}.{name}": other for name, other in given.items()}  # sinks, windows, linear replacements
    others |= {name: other for name, other in block.items() if name not in ("attention", "ffn")}
    for name, other in others.items():
        if other:
            raise refused(f"block_configs {name}", other, "it is not supported; only sizes and no_op are")
    if left_out:
        return None
    if not value or value < 0:
        raise refused(f"block_configs {branch}.{field}", value, "it needs a number above 0 where no_op is false")
    return value


def _block(field: str, value: float | None) -> dict[str, Any]:
    return {field: value, "no_op": value is None, "replace_with_linear": False}


FAMILY = Family(
    architecture="DeciLMForCausalLM",
    model_type="nemotron-nas",
    hf_defaults={**HF_DEFAULTS, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    parts=(
        *(part for part in DECODER if part.hf_names != ("intermediate_size",)),
        block_configs(),
        attention_and_mlp_bias(mlp_field="mlp_bias"),
    ),
    constants=CONSTANTS,
    rows=llama_table,
)
