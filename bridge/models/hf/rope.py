"""The rotary fields of a Hugging Face config, in the form of the hub (rope_theta, rope_scaling) and of transformers 5
(rope_parameters), and the model keys rotary_base, rotary_percent and rope_parameters. The priorities are those of
transformers 5.23 (RotaryEmbeddingConfigMixin)."""

from typing import Any

from bridge.errors import ConversionError
from bridge.models.hf.fields import Part, Values, refused

TRAINED = "original_max_position_embeddings"
SHARE = "partial_rotary_factor"
HF_NAMES = ("rope_theta", "rope_scaling", "rope_parameters", SHARE, TRAINED)
MODEL_KEYS = ("position_embedding_type", "rotary_base", "rotary_percent", "rope_parameters")
# Types whose trained length is max_position_embeddings unless given; a top-level field of that name wins.
WITH_TRAINED_LENGTH = ("llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0


def rope(*, partial: float | None = None, theta: float = DEFAULT_THETA, scaling: Values | None = None) -> Part:
    """Base and scaling of the rotary embedding, and the share of each head's channels that it rotates.

    What a config has that does not say: `theta`, the base (`default_theta` of the class in transformers), `scaling`,
    rope_parameters, and `partial`, the share; None: the family rotates every channel, and a config that asks for less
    is refused. Pairs of neighbouring channels (GLM-4, Ernie) are the constant `rotary_interleaved: True` of a family.
    """

    def read(hf: Values) -> dict[str, Any]:
        silent = scaling is not None and not hf.get("rope_scaling") and not hf.get("rope_parameters")
        return _read({**hf, "rope_parameters": scaling} if silent else hf, partial, theta)

    def write(model: Values) -> dict[str, Any]:
        fields = _write(model, partial)
        said = {} if scaling is None or fields["rope_scaling"] else {"rope_scaling": {"rope_type": "default"}}
        return fields | said

    return Part(HF_NAMES, MODEL_KEYS, read, write)


LOCAL = "rope_local_base_freq"
# Their angles depend neither on the length nor on a factor, so that one scaling for some layers alone is exact.
FOR_SOME_LAYERS = ("default", "linear", "llama3")


def rope_and_local_rope(window: Part, *, theta: float, local_theta: float) -> Part:
    """`window` and two rotary embeddings: one without scaling for the layers with the window, one for the others.

    transformers 5 has rope_parameters for each of layer_types; on the hub rope_theta and rope_scaling are for layers
    without the window, rope_local_base_freq for those with it. The thetas given here hold where a config has none.
    """

    def read(hf: Values) -> dict[str, Any]:
        given = hf.get("rope_parameters") or {}
        if not given.keys() <= {"full_attention", "sliding_attention"}:
            raise refused("rope_parameters", given, "this family has parameters of full_ and sliding_attention each")
        scaling = hf.get("rope_scaling") or {}
        if scaling and "rope_type" not in scaling:
            raise refused("rope_scaling", scaling, "transformers reads rope_type in it for this family, not type")
        own = {"rope_theta": hf.get("rope_theta", theta)} | (given.get("full_attention") or {}) | scaling
        keys = window.read(hf) | _read({**hf, "rope_parameters": own, "rope_scaling": None}, None, theta)
        kind = keys.get("rope_parameters", {}).get("rope_type", "default")
        if kind not in FOR_SOME_LAYERS:
            raise refused("rope_type", kind, f"for some layers alone only {', '.join(FOR_SOME_LAYERS)} are supported")
        local = {"rope_theta": hf.get(LOCAL, local_theta)} | (given.get("sliding_attention") or {})
        base, kind = local.pop("rope_theta"), local.pop("rope_type", "default")
        if local or kind != "default" or base != int(base):
            raise refused("rope_parameters.sliding_attention", given, "it needs rope_type default and a whole theta")
        return keys | ({LOCAL: int(base)} if "window_size" in keys else {})

    def write(model: Values) -> dict[str, Any]:
        base = model[LOCAL]
        if base is None:
            if model["window_size"] is not None and model["rope_parameters"]:
                raise refused(f"model.{LOCAL}", None, "layers with a window have no scaling here; set their base")
            base = local_theta if model["window_size"] is None else model["rotary_base"]
        return window.write(model) | _write(model, None) | {LOCAL: float(base)}

    hf_names = (*HF_NAMES, LOCAL, *window.hf_names)
    return Part(hf_names, (*MODEL_KEYS, LOCAL, *window.model_keys), read, write)


def _read(hf: Values, partial: float | None, default_theta: float) -> dict[str, Any]:
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise refused(
            "rope_parameters", given, f"this family has one rotary embedding, not one per {', '.join(nested)}"
        )
    theta = given.pop("rope_theta", None)
    theta = next((t for t in (theta, hf.get("rope_theta")) if t is not None), default_theta)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    shares = (given.pop(SHARE, None), hf.get(SHARE), partial, 1.0)
    share = float(next(value for value in shares if value is not None))
    dim = _rotated_channels(hf, share, partial)
    theta = int(theta) if theta == int(theta) else float(theta)
    keys: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": theta}
    keys |= {} if share == 1.0 else {"rotary_percent": share}
    if kind == "default":
        if given:
            raise refused("rope_parameters", given, "rope_type default has no such parameters")
        return keys
    if kind in WITH_TRAINED_LENGTH:
        given[TRAINED] = hf.get(TRAINED) or given.get(TRAINED) or hf["max_position_embeddings"]
    else:
        given.pop(TRAINED, None)  # transformers does not read it for the other types
    parameters = {"rope_type": kind} | {name: value for name, value in given.items() if value is not None}
    _check(parameters, dim=dim, length=hf["max_position_embeddings"])
    return keys | {"rope_parameters": parameters}


def _rotated_channels(hf: Values, share: float, partial: float | None) -> int:
    """How many channels of a head are rotated: int(channels * share), in transformers and in megatron-core."""
    if partial is None and share != 1.0:
        raise refused(SHARE, share, "this family rotates every channel")
    channels = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    dim = int(channels * share)
    if not 0 < share <= 1 or dim == 0 or dim % 2:
        raise refused(SHARE, share, f"it has to leave an even number of the {channels} channels, at least 2")
    return dim


def _check(parameters: dict[str, Any], *, dim: int, length: int) -> None:
    """Ask the formulas themselves whether they know the type and all of its parameters."""
    from bridge.errors import ConfigError
    from bridge.models.modules.rope import inverse_frequencies

    try:
        inverse_frequencies(parameters, rotary_base=DEFAULT_THETA, dim=dim, seq_len=length, max_sequence_length=length)
    except ConfigError as error:
        raise ConversionError(str(error).replace("model.rope_parameters", "rope_parameters")) from error


def _write(model: Values, partial: float | None) -> dict[str, Any]:
    """Hub form: transformers 4 and 5 read it alike."""
    if model["position_embedding_type"] != "rope":
        raise refused("model.position_embedding_type", model["position_embedding_type"], "this family has rope")
    share = float(model["rotary_percent"])
    if partial is None and share != 1.0:
        raise refused("model.rotary_percent", share, "this family rotates every channel")
    parameters = model["rope_parameters"]
    scaling = None if not parameters or parameters["rope_type"] == "default" else dict(parameters)
    fields = {"rope_theta": float(model["rotary_base"]), "rope_scaling": scaling}
    return fields if share == 1.0 and partial in (None, 1.0) else fields | {SHARE: share}
