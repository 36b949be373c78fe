"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's shape with query, key and value in one tensor, gate and up in one
tensor, and LongRoPE, in Phi-4-mini on three quarters of the channels."""

from typing import Any

from bridge.models.families.llama import CONSTANTS, DECODER, HF_DEFAULTS
from bridge.models.family import Family
from bridge.models.hf.decoder_rows import Model, attention, embedding, final, mlp, norms
from bridge.models.hf.fields import Part, Values, attention_shape, dropout, refused, window_everywhere
from bridge.models.hf.rope import HF_NAMES, MODEL_KEYS, TRAINED, rope
from bridge.weights.table import Table

ROPE = rope(partial=1.0)


def long_rope() -> Part:
    """Plain or longrope, older files say su or yarn, with the trained length as a field of the config itself."""

    def read(hf: Values) -> dict[str, Any]:
        field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
        scaling = dict(hf.get(field) or {})
        kind = scaling.get("rope_type") or scaling.pop("type", None) or "default"
        if kind not in ("default", "longrope", "su", "yarn"):
            raise refused(field, kind, "a Phi-3 has rope_type default or longrope")
        scaling["rope_type"] = "default" if kind == "default" else "longrope"
        return ROPE.read({**hf, "rope_scaling": scaling})

    def write(model: Values) -> dict[str, Any]:
        fields = ROPE.write(model)
        scaling = fields["rope_scaling"] or {}
        if scaling.get("rope_type", "longrope") != "longrope":
            raise refused("model.rope_parameters", scaling, "a Phi-3 has rope_type longrope or none")
        trained = {TRAINED: scaling.pop(TRAINED, model["max_sequence_length"])} if scaling else {}
        return fields | trained

    return Part(HF_NAMES, MODEL_KEYS, read, write)


def rows(model: Model) -> Table:
    qkv = attention(model, qkv=("self_attn.qkv_proj",))
    return Table([*embedding(model), *norms(model), *qkv, *mlp(model, fc1=("mlp.gate_up_proj",)), *final(model)])


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    hf_defaults={
        **HF_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        TRAINED: 4096,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "sliding_window": None,
    },
    parts=(
        *(part for part in DECODER if part.model_keys != MODEL_KEYS),
        long_rope(),
        attention_shape(has_head_dim=False),
        dropout("resid_pdrop", "embd_pdrop"),
        window_everywhere(),
    ),
    constants={
        **{key: value for key, value in CONSTANTS.items() if key != "hidden_dropout"},
        "add_bias_linear": False,
        "add_qkv_bias": False,
    },
    rows=rows,
)
