"""The rotary fields of a Hugging Face config, in the form of the hub (rope_theta, rope_scaling) and of transformers 5
(rope_parameters), and the model keys rotary_base and rope_parameters. The priorities are those of transformers 5.23
(RotaryEmbeddingConfigMixin)."""

from typing import Any

from bridge.errors import ConversionError
from bridge.models.hf_fields import Part, Values, refused

TRAINED = "original_max_position_embeddings"
HF_NAMES = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", TRAINED)
MODEL_KEYS = ("position_embedding_type", "rotary_base", "rotary_percent", "rope_parameters")
# Types whose trained length is max_position_embeddings unless given; a top-level field of that name wins.
WITH_TRAINED_LENGTH = ("llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0


def rope() -> Part:
    """Base and scaling of the rotary embedding of every channel."""
    return Part(HF_NAMES, MODEL_KEYS, _read, _write)


def _read(hf: Values) -> dict[str, Any]:
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
    for share in (given.pop("partial_rotary_factor", None), hf.get("partial_rotary_factor")):
        if share not in (None, 1, 1.0):
            raise refused("partial_rotary_factor", share, "this family rotates every channel")
    if theta != int(theta):
        raise refused("rope_theta", theta, "megatron-core's rotary_base is a whole number")
    keys: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": int(theta)}
    if kind == "default":
        if given:
            raise refused("rope_parameters", given, "rope_type default has no such parameters")
        return keys
    if kind in WITH_TRAINED_LENGTH:
        given[TRAINED] = hf.get(TRAINED) or given.get(TRAINED) or hf["max_position_embeddings"]
    else:
        given.pop(TRAINED, None)  # transformers does not read it for the other types
    parameters = {"rope_type": kind} | {name: value for name, value in given.items() if value is not None}
    _check(parameters, hf)
    return keys | {"rope_parameters": parameters}


def _check(parameters: dict[str, Any], hf: Values) -> None:
    """Ask the formulas themselves whether they know the type and all of its parameters."""
    from bridge.errors import ConfigError
    from bridge.models.rope import inverse_frequencies

    channels = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    length = hf["max_position_embeddings"]
    try:
        inverse_frequencies(
            parameters, rotary_base=DEFAULT_THETA, dim=channels, seq_len=length, max_sequence_length=length
        )
    except ConfigError as error:
        raise ConversionError(str(error).replace("model.rope_parameters", "rope_parameters")) from error


def _write(model: Values) -> dict[str, Any]:
    """Hub form: transformers 4 and 5 read it alike."""
    if model["position_embedding_type"] != "rope":
        raise refused("model.position_embedding_type", model["position_embedding_type"], "this family has rope")
    if model["rotary_percent"] != 1.0:
        raise refused("model.rotary_percent", model["rotary_percent"], "this family rotates every channel")
    parameters = model["rope_parameters"]
    scaling = None if not parameters or parameters["rope_type"] == "default" else dict(parameters)
    return {"rope_theta": float(model["rotary_base"]), "rope_scaling": scaling}
