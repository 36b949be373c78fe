"""SmolLM3: Llama's shape with layers that do not rotate queries and keys (NoPE), every fourth one by default."""

from typing import Any

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import llama_table
from bridge.models.hf.fields import Part, Values, attention_and_mlp_bias, attention_shape, refused, window_by_layer
from bridge.models.hf.rope import HF_NAMES, rope


def every_nth_left_out(n: int, count: int) -> list[bool]:
    return [(layer + 1) % n != 0 for layer in range(count)]


def rotated_layers(hf: Values) -> list[bool]:
    """Which layers rotate: those with 1 in `no_rope_layers`, else all but every `no_rope_layer_interval`-th one."""
    count, given = hf["num_hidden_layers"], hf.get("no_rope_layers")
    if given is None:
        return every_nth_left_out(hf["no_rope_layer_interval"], count)
    if len(given) < count:
        raise refused("no_rope_layers", given, f"it needs a 1 (rotated) or 0 for each of {count} layers")
    return [bool(layer) for layer in given[:count]]


def layers_without_rope() -> Part:
    """`no_rope_layers` has 1 where a layer rotates; megatron-core's `no_rope_freq` has 1 where it does not, or is n for
    every n-th layer of a whole number of times n."""

    def read(hf: Values) -> dict[str, Any]:
        rotated = rotated_layers(hf)
        if all(rotated):
            return {}
        every = rotated.index(False) + 1
        if len(rotated) % every == 0 and rotated == every_nth_left_out(every, len(rotated)):
            return {"no_rope_freq": every}
        return {"no_rope_freq": [int(not layer) for layer in rotated]}

    def write(model: Values) -> dict[str, Any]:
        pattern, count = model["no_rope_freq"], model["num_layers"]
        if isinstance(pattern, list):
            rotated = [not layer for layer in pattern]
        else:
            rotated = every_nth_left_out(pattern or count + 1, count)
        return {"no_rope_layers": [int(layer) for layer in rotated]}

    return Part(("no_rope_layers", "no_rope_layer_interval"), ("no_rope_freq",), read, write)


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    hf_defaults={
        **HF_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    parts=(
        *(part for part in DECODER if part.hf_names != HF_NAMES),
        rope(theta=2000000.0),
        layers_without_rope(),
        attention_shape(has_head_dim=False),
        attention_and_mlp_bias(mlp_field="mlp_bias"),
        window_by_layer(by_default=lambda hf: [not layer for layer in rotated_layers(hf)]),
    ),
    constants=CONSTANTS,
    rows=llama_table,
)
