"""The rotary fields of a Hugging Face config, in the form of the hub (rope_theta, rope_scaling) and of transformers 5
(rope_parameters), and the model keys rotary_base, rotary_percent and rope_parameters. The priorities are those of
transformers 5.23 (RotaryEmbeddingConfigMixin)."""

from typing import Any

from bridge.errors import ConversionError
from bridge.models.hf_fields import Part, Values, refused

TRAINED = "original_max_position_embeddings"
SHARE = "partial_rotary_factor"
HF_NAMES = ("rope_theta", "rope_scaling", "rope_parameters", SHARE, TRAINED)
MODEL_KEYS = ("position_embedding_type", "rotary_base", "rotary_percent", "rope_parameters")
# Types whose trained length is max_position_embeddings unless given; a top-level field of that name wins.
WITH_TRAINED_LENGTH = ("llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0


def rope(*, partial: float | None = None) -> Part:
    """Base and scaling of the rotary embedding, and the share of each head's channels that it rotates.

    `partial` is the share in a config that does not say (transformers' default for the class); None: the family rotates
    every channel, and a config that asks for less is refused. Pairs of neighbouring channels (GLM-4, Ernie) are the
    constant `rotary_interleaved: True` of a family.
    """
    return Part(HF_NAMES, MODEL_KEYS, lambda hf: _read(hf, partial), lambda model: _write(model, partial))


def _read(hf: Values, partial: float | None) -> dict[str, Any]:
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise refused(
            "rope_parameters", given, f"this family has one rotary embedding, not one per {', '.join(nested)}"
        )
    theta = given.pop("rope_theta", None)
    theta = next((t for t in (theta, hf.get("rope_theta")) if t is not None), DEFAULT_THETA)
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
    from bridge.models.rope import inverse_frequencies

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
