"""Whether a built model carries what the user set: nothing may get lost on the way, or be rewritten without a word."""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.config import mcore_fields
from bridge.config.routing import Routed
from bridge.errors import ConfigError, shown
from bridge.models.mcore_config import WITHOUT_STORAGE, attention_factor_fields, precision, typed

# GPTModel arguments that the model keeps as attributes: name -> attribute.
MODEL_ATTRIBUTES = {
    "max_sequence_length": "max_sequence_length",
    "position_embedding_type": "position_embedding_type",
    "rotary_percent": "rotary_percent",
    "rotary_base": "rotary_base",
    "share_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    "vocab_size": "true_vocab_size",
}
# Fields that megatron-core keeps in another form: (the user's value, the live config) -> that form.
OTHER_FORM: dict[str, Callable[[Any, Any], Any]] = {
    "cuda_graph_scope": lambda value, _: (
        [] if value == "full" else value.split(",") if isinstance(value, str) else value
    ),
    "no_rope_freq": lambda value, config: _pattern(value, config.num_layers) if isinstance(value, int) else value,
}
# Fields that parts of a model (experts, router, attention) have in a copy of the config, with a value of their own.
OF_A_PART = frozenset(
    {
        "add_bias_linear",
        "ffn_hidden_size",
        "layernorm_epsilon",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "mtp_num_layers",
        "num_query_groups",
    }
)


def check_live(routed: Routed, model: Any, *, dtype: torch.dtype | None = None, meta: bool = False) -> None:
    """Raise ConfigError unless the built `model` (a GPT), and every part with a config of its own, has what is set.

    `dtype` and `meta` are those the model was built with: they override values on purpose.
    """
    overridden = set(attention_factor_fields(routed, routed.transformer))
    overridden |= set(precision({}, dtype)) if dtype is not None else set()
    overridden |= set(WITHOUT_STORAGE) if meta else set()
    wanted = {name: value for name, value in typed(routed).items() if name not in overridden}
    same_fields(model.config, wanted, routed, owner="the model")
    in_parts = {name: value for name, value in wanted.items() if name not in OF_A_PART}
    for name, config in _copies(model):
        same_fields(config, in_parts, routed, owner=name)
    if routed.get("recompute_method") == "uniform":
        _check_units(model, routed)
    if "layernorm" in routed.get("recompute_modules", ()):
        _check_norms(model, routed)
    for name, attribute in MODEL_ATTRIBUTES.items():
        if name in routed.gpt:
            same(getattr(model, attribute), routed.gpt[name], key=routed.key(name), owner="the model")


def _check_units(model: Any, routed: Routed) -> None:
    """megatron-core runs past the last layer of a chunk when the last unit is short."""
    layers, together = len(model.decoder.layers), model.config.recompute_num_layers
    if layers % together:
        legal = [size for size in range(1, layers + 1) if layers % size == 0]
        raise ConfigError(
            f"{routed.key('recompute_num_layers')}: layers of a chunk % "
            f"recompute_num_layers must be 0, but {layers} % {together} = {layers % together}; "
            f"set {' or '.join(map(str, legal))}"
        )


def _check_norms(model: Any, routed: Routed) -> None:
    """Transformer Engine makes norms a part of the linear layer behind them; then there is none to compute again."""
    alone = [layer.recompute_input_layernorm or layer.recompute_pre_mlp_layernorm for layer in model.decoder.layers]
    if alone and not any(alone) and model.config.num_moe_experts is None:
        raise ConfigError(
            f"{routed.key('recompute_modules')}: layernorm has no effect where every norm "
            "is part of a linear layer; leave layernorm out, or set model.transformer_impl=local"
        )


def same_fields(config: Any, wanted: dict[str, Any], routed: Routed, *, owner: str) -> None:
    """Raise ConfigError unless every field of `wanted` is the same in `config`."""
    for name, value in wanted.items():
        if name in mcore_fields.mla_only() and not hasattr(config, name):
            continue  # an argument of GPTModel in other models: rotary_base, rotary_percent
        value = OTHER_FORM[name](value, config) if name in OTHER_FORM else value
        same(getattr(config, name), value, key=routed.key(name), owner=owner)


def same(live: Any, wanted: Any, *, key: str, owner: str) -> None:
    """Raise ConfigError unless `live`, of `owner`, is what the user wanted, in whichever form YAML has it."""
    if _plain(live) != _plain(wanted):
        raise ConfigError(
            f"{key}: {shown(_plain(wanted))} did not reach {owner}, which has {shown(_plain(live))}; leave it out"
        )


def _copies(model: Any) -> Iterator[tuple[str, TransformerConfig]]:
    """(name of a part, its config) for every config in the model that is not the model's own."""
    seen = {id(model.config)}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, TransformerConfig) and id(config) not in seen:
            seen.add(id(config))
            yield name, config


def _pattern(every: int, num_layers: int) -> list[int]:
    """Which layers have no rotary embedding when every n-th has none."""
    return [int(number % every == 0) for number in range(1, num_layers + 1)]


def _plain(value: Any) -> Any:
    """Lists for tuples, names for enumerations, and for a pipeline layout the text or lists it was made from."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "input_data", value)
