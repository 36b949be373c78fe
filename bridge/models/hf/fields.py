"""Pieces of a Hugging Face config and the `model` keys that say the same. Families list them; none is known here.

A Part reads some Hugging Face fields and gives model keys, and writes them back. Parts see complete values: Hugging
Face fields with transformers' defaults filled in, model keys with megatron-core's. No torch here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bridge.errors import ConversionError, shown

Values = Mapping[str, Any]


class Part(NamedTuple):
    """Hugging Face fields and model keys with the same meaning, and the two translations between them.

    `read` raises ConversionError for a value megatron-core cannot express, `write` for one Hugging Face cannot.
    """

    hf_names: tuple[str, ...]
    model_keys: tuple[str, ...]
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[Values], dict[str, Any]]


# Kind of a field -> the types that a config.json may have for it, and what to call them.
KINDS: dict[Callable[[Any], Any], tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}


def same(hf_name: str, model_key: str, kind: Callable[[Any], Any] = int) -> Part:
    """One field, one key, one value; `kind` is the type transformers wants (its configs refuse 1 for 1.0)."""

    def read(hf: Values) -> dict[str, Any]:
        types, wanted = KINDS[kind]
        if type(hf[hf_name]) not in types:  # bool is an int to isinstance, and every text is true to bool
            raise refused(hf_name, hf[hf_name], f"it has to be {wanted}")
        return {model_key: kind(hf[hf_name])}

    return Part(
        (hf_name,),
        (model_key,),
        read,
        lambda model: {hf_name: kind(model[model_key])},
    )


def optional(hf_name: str, model_key: str, kind: Callable[[Any], Any] = float) -> Part:
    """One field, one key, one value, or null where the model does without."""
    return Part(
        (hf_name,),
        (model_key,),
        lambda hf: {} if hf[hf_name] is None else {model_key: kind(hf[hf_name])},
        lambda model: {hf_name: None if model[model_key] is None else kind(model[model_key])},
    )


def only(hf_name: str, *values: Any, written: bool = False) -> Part:
    """A field of which only these values are supported, the default among them. `written`: other programs look for it,
    and find the first."""

    def read(hf: Values) -> dict[str, Any]:
        if hf_name in hf and hf[hf_name] not in values:
            raise refused(hf_name, hf[hf_name], f"only {' or '.join(map(repr, values))} is supported")
        return {}

    return Part((hf_name,), (), read, lambda model: {hf_name: values[0]} if written else {})


def unread(*hf_names: str) -> Part:
    """Fields that files have though transformers' class does not read them."""
    return Part(hf_names, (), lambda hf: {}, lambda model: {})


def dropout(residual: str, embedding: str) -> Part:
    """The dropout of residual branches and of the embedding, which is one number in megatron-core."""

    def read(hf: Values) -> dict[str, Any]:
        if hf[residual] != hf[embedding]:
            raise refused(
                residual, hf[residual], f"megatron-core has one rate, but {embedding} is {shown(hf[embedding])}"
            )
        return {"hidden_dropout": float(hf[residual])}

    return Part(
        (residual, embedding),
        ("hidden_dropout",),
        read,
        lambda model: dict.fromkeys((residual, embedding), float(model["hidden_dropout"])),
    )


# transformers' activation -> model.activation_func. The first name of a value is the one written back.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}


def activation(hf_name: str = "hidden_act", *, prefer: str | None = None) -> Part:
    """The MLP's activation function by name; `prefer` is the one to write for its function."""

    def read(hf: Values) -> dict[str, Any]:
        if hf[hf_name] not in ACTIVATIONS:
            raise refused(hf_name, hf[hf_name], f"known are {', '.join(ACTIVATIONS)}")
        return {"activation_func": ACTIVATIONS[hf[hf_name]]}

    def write(model: Values) -> dict[str, Any]:
        names = [name for name, ours in ACTIVATIONS.items() if ours == model["activation_func"]]
        return {hf_name: prefer if prefer in names else names[0]}

    return Part((hf_name,), ("activation_func",), read, write)


def attention_shape(*, has_head_dim: bool = True) -> Part:
    """Heads, key-value groups and channels per head, with transformers' rules for the two that may be absent.

    Without a field `head_dim` in its config class a family still honours it, so it is written where it differs.
    """

    def read(hf: Values) -> dict[str, Any]:
        heads = int(hf["num_attention_heads"])
        channels = hf.get("head_dim") or hf["hidden_size"] // heads
        groups = hf.get("num_key_value_heads") or heads
        return {"num_attention_heads": heads, "num_query_groups": int(groups), "kv_channels": int(channels)}

    def write(model: Values) -> dict[str, Any]:
        heads, groups, channels = (model[key] for key in ("num_attention_heads", "num_query_groups", "kv_channels"))
        own = has_head_dim or channels != model["hidden_size"] // heads
        return {"num_attention_heads": heads, "num_key_value_heads": groups} | ({"head_dim": channels} if own else {})

    hf_names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return Part(hf_names, ("num_attention_heads", "num_query_groups", "kv_channels"), read, write)


def attention_and_mlp_bias(*, mlp_field: str | None, output_field: str | None = None) -> Part:
    """`attention_bias` (query, key, value, output) and, where a family has it, `mlp_bias`.

    With `output_field` the output projection has a field of its own. megatron-core's add_bias_linear is for attention
    and MLP; add_attention_bias, which is ours, is written only where they differ.
    """
    hf_names = tuple(name for name in ("attention_bias", output_field, mlp_field) if name)

    def read(hf: Values) -> dict[str, Any]:
        qkv, mlp = bool(hf["attention_bias"]), bool(mlp_field and hf[mlp_field])
        output = bool(hf[output_field]) if output_field else qkv
        if output and not qkv:
            raise refused(str(output_field), True, "a bias on the output projection needs attention_bias")
        own = {} if output == mlp else {"add_attention_bias": output}
        return {"add_bias_linear": mlp, "add_qkv_bias": qkv and not output, **own}

    def write(model: Values) -> dict[str, Any]:
        mlp, output = model["add_bias_linear"], model["add_attention_bias"]
        output = mlp if output is None else output
        qkv = output or model["add_qkv_bias"]
        if qkv and not output and not output_field:
            raise refused(
                "model.add_qkv_bias", True, "this family has biases on all four attention projections or none"
            )
        if mlp and not mlp_field:
            raise refused("model.add_bias_linear", True, "this family has no biases in the MLP")
        values = {"attention_bias": qkv, output_field: output, mlp_field: mlp}
        return {name: values[name] for name in hf_names}

    return Part(hf_names, ("add_bias_linear", "add_qkv_bias", "add_attention_bias"), read, write)


WINDOW_KEYS = ("window_size", "window_attn_skip_freq")


def window_everywhere(*, switch: str | None = None, unread: str | None = None) -> Part:
    """`sliding_window` tokens seen in every layer, the query's own included, which megatron-core does not count.

    `switch`: the field that turns it on. `unread`: a field of other families that files have and transformers ignores.
    """
    hf_names = tuple(name for name in ("sliding_window", switch, unread) if name)

    def read(hf: Values) -> dict[str, Any]:
        width = hf["sliding_window"] if switch is None or hf[switch] else None
        return {} if width is None else {"window_size": _window(width)}

    def write(model: Values) -> dict[str, Any]:
        layers = _windowed_layers(model)
        if any(layers) and not all(layers):
            raise refused(
                "model.window_attn_skip_freq", model["window_attn_skip_freq"], "every layer has the window here"
            )
        return {"sliding_window": _width(model) if any(layers) else None} | ({switch: any(layers)} if switch else {})

    return Part(hf_names, WINDOW_KEYS, read, write)


def window_by_layer(*, by_default: Callable[[Values], list[bool]] | None = None) -> Part:
    """`sliding_window` in some layers: those `layer_types` names.

    Without it, those that `by_default` picks, or if that is None those from `max_window_layers` on.
    """
    hf_names = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(hf: Values) -> dict[str, Any]:
        width = hf["sliding_window"] if hf["use_sliding_window"] else None
        count = hf["num_hidden_layers"]
        pick = by_default or (lambda hf: [layer >= hf["max_window_layers"] for layer in range(count)])
        sliding = _sliding_layers(hf, [width is not None and layer for layer in pick(hf)])
        if not any(sliding):
            return {}
        if width is None:
            raise refused(
                "layer_types", hf["layer_types"], "sliding_attention needs use_sliding_window and sliding_window"
            )
        pattern = {} if all(sliding) else {"window_attn_skip_freq": [int(layer) for layer in sliding]}
        return {"window_size": _window(width), **pattern}

    def write(model: Values) -> dict[str, Any]:
        sliding = _windowed_layers(model)
        width = _width(model) if any(sliding) else None
        first = sliding.index(True) if any(sliding) else len(sliding)
        types = ["sliding_attention" if layer else "full_attention" for layer in sliding]
        fields = dict(zip(hf_names, (any(sliding), width, first, types), strict=True))
        return {name: value for name, value in fields.items() if name != "max_window_layers" or by_default is None}

    return Part(hf_names, WINDOW_KEYS, read, write)


def window_by_pattern(every: int, *, field: str | None = None, unused: int) -> Part:
    """`sliding_window` in the layers that `layer_types` names, or in all but each `every`-th one.

    `field` may hold another number than `every`; `unused` is written as the width where no layer has the window.
    """
    hf_names = ("sliding_window", "layer_types", *([field] if field else []))

    def read(hf: Values) -> dict[str, Any]:
        period = hf.get(field, every) if field else every
        sliding = _sliding_layers(hf, [(layer + 1) % period != 0 for layer in range(hf["num_hidden_layers"])])
        if not any(sliding):
            return {}
        regular = [n for n in range(2, len(sliding) + 1) if sliding == [bool((i + 1) % n) for i in range(len(sliding))]]
        pattern = regular[0] if regular else [int(layer) for layer in sliding]
        return {"window_size": _window(hf["sliding_window"])} | (
            {} if all(sliding) else {"window_attn_skip_freq": pattern}
        )

    def write(model: Values) -> dict[str, Any]:
        sliding = _windowed_layers(model)
        types = ["sliding_attention" if layer else "full_attention" for layer in sliding]
        return {"sliding_window": _width(model) if any(sliding) else unused, "layer_types": types}

    return Part(hf_names, WINDOW_KEYS, read, write)


def _sliding_layers(hf: Values, unless_named: list[bool]) -> list[bool]:
    """Which layers have the window by `layer_types`, or `unless_named` where the config does not say."""
    types, count = hf.get("layer_types"), hf["num_hidden_layers"]
    if types is None:
        return unless_named
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown or len(types) != count:
        raise refused("layer_types", types, f"it needs {count} of full_attention and sliding_attention")
    return [kind == "sliding_attention" for kind in types]


def _window(width: Any) -> list[int]:
    if not isinstance(width, int) or width < 1:
        raise refused("sliding_window", width, "it needs a whole number from 1 up")
    return [width - 1, 0]


def _width(model: Values) -> int:
    left, right = model["window_size"]
    if left < 0 or right > 0:
        raise refused("model.window_size", [left, right], "a causal window is [tokens to the left, 0]")
    return left + 1


def _windowed_layers(model: Values) -> list[bool]:
    """Which layers have the window, by megatron-core's rule (is_layer_window_attention)."""
    count, pattern = model["num_layers"], model["window_attn_skip_freq"]
    if model["window_size"] is None:
        return [False] * count
    if isinstance(pattern, int):
        return [(layer + 1) % pattern != 0 for layer in range(count)]
    return [True] * count if pattern is None else [bool(layer) for layer in pattern]


def refused(name: str, value: Any, reason: str) -> ConversionError:
    """The error for a field that has no counterpart on the other side."""
    return ConversionError(f"{name}: {shown(value)} cannot be converted; {reason}")
