"""What megatron-core makes of the values a configuration leaves out, and what each layer of a model then is.

Its own configuration classes say the same when a model is built; here it is for everyone who asks before, without
torch. `model` is a mapping of keys of the section `model`, complete or not; the fields of a built model's config
(`vars(config)`) are one, too.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from bridge.config import mcore_fields, own_fields
from bridge.errors import ConfigError

# Keys for which null says something, although megatron-core's default is a number.
NULLABLE = ("q_lora_rank",)
# What the program does where megatron-core's own default is None, code, or another one.
OWN_DEFAULTS = {
    "activation_func": "gelu",
    "make_vocab_size_divisible_by": 1,
    # megatron-core's, allgather, moves every token to every rank, and even without experts refuses variable_seq_lengths
    "moe_token_dispatcher_type": "alltoall",
    **own_fields.defaults(),
}


class Kind(NamedTuple):
    """What makes layers different: experts or a dense MLP, key-value groups, channels of the MLP; 0: no such branch."""

    experts: bool
    groups: int
    ffn: int


class HeadWidths(NamedTuple):
    """Channels of a head of attention: of a query or key, and of a value."""

    key: int
    value: int


@cache
def defaults() -> dict[str, Any]:
    """Model key -> its default. None: it has none, none that YAML can hold, or one that follows from other keys."""
    fields, known = mcore_fields.targets(), mcore_fields.defaults()
    return {name: known.get(name) for name in fields["transformer"] | fields["gpt"]} | OWN_DEFAULTS


def complete(model: Mapping[str, Any]) -> dict[str, Any]:
    """`model` with every absent key filled as megatron-core would fill it."""
    given = {name: value for name, value in model.items() if value is not None or name in NULLABLE}
    return with_derived(defaults() | given)


def with_derived(full: Mapping[str, Any]) -> dict[str, Any]:
    """`full` with the values that follow from others where it has None for them."""
    hidden, heads = full["hidden_size"], full["num_attention_heads"]
    derived = {
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "ffn_hidden_size": mlp_width(hidden),
    }
    filled = {**full, **{name: value for name, value in derived.items() if full.get(name) is None}}
    if filled.get("num_moe_experts") is not None and filled.get("moe_ffn_hidden_size") is None:
        filled["moe_ffn_hidden_size"] = filled["ffn_hidden_size"]
    return filled


def mlp_width(hidden_size: int) -> int:
    """Channels of an MLP that nothing is said about."""
    return 4 * hidden_size


def layers(model: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Each layer's kind. Raises ConfigError when a list does not have a number for each layer."""
    full = complete(model)
    return tuple(
        Kind(*kind)
        for kind in zip(
            moe_layers(full),
            _of_each(full, "num_query_groups_by_layer", full["num_query_groups"]),
            _of_each(full, "ffn_hidden_size_by_layer", full["ffn_hidden_size"]),
            strict=True,
        )
    )


def moe_layers(model: Mapping[str, Any]) -> list[bool]:
    """Which layers have experts: by megatron-core's rule for moe_layer_freq every n-th from the first, or a list."""
    count, pattern = model["num_layers"], model.get("moe_layer_freq", 1)
    if model.get("num_moe_experts") is None:
        return [False] * count
    if not isinstance(pattern, int):
        return list(map(bool, _of_each(model, "moe_layer_freq", 1)))
    if pattern < 1:
        raise ConfigError(f"model.moe_layer_freq: {pattern} is not positive; set a whole number from 1 up, or a list")
    return [layer % pattern == 0 for layer in range(count)]


def head_widths(model: Mapping[str, Any]) -> HeadWidths:
    """Channels of each head of attention; with latent attention a key's rotated part is counted with the other."""
    full = complete(model)
    if full["multi_latent_attention"]:
        return HeadWidths(full["qk_head_dim"] + full["qk_pos_emb_head_dim"], full["v_head_dim"])
    return HeadWidths(full["kv_channels"], full["kv_channels"])


def _of_each(model: Mapping[str, Any], name: str, otherwise: int) -> list[int]:
    """The list of key `name`, one number for each layer; without one `otherwise` for all."""
    count, numbers = model["num_layers"], model.get(name)
    if numbers is None:
        return [otherwise] * count
    if len(numbers) != count or min(numbers, default=0) < 0:
        raise ConfigError(
            f"model.{name}: {numbers} is not a list of one number from 0 up for each of {count} layers; set that"
        )
    return list(numbers)
