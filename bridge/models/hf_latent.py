"""Multi-latent attention and multi-token prediction in the configs and files of the DeepSeek line."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from bridge.models import decoder_rows, hf_rope
from bridge.models.decoder_rows import HF, MCORE, Model, Rows
from bridge.models.hf_fields import Part, Values, refused
from bridge.weights.table import Ignore, Row

# What transformers' attention has whatever its config says: norms of both latents, with RMSNorm's default epsilon
# (modeling_deepseek_v3.py builds them without rms_norm_eps).
LATENT_CONSTANTS = {"multi_latent_attention": True, "qk_layernorm": True, "latent_layernorm_epsilon": 1e-6}

# Hugging Face field -> model key.
WIDTHS = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}


def latent_attention() -> Part:
    """Heads, ranks of the latents and channels per head.

    `head_dim` and `qk_head_dim` are computed by transformers' config class, and have no say of their own.
    """
    hf_names = (
        *("num_attention_heads", "num_key_value_heads", "q_lora_rank", *WIDTHS),
        *("head_dim", "qk_head_dim", "attention_bias", "rope_interleave"),
    )

    def read(hf: Values) -> dict[str, Any]:
        heads, rank = int(hf["num_attention_heads"]), hf["q_lora_rank"]
        rotated = hf["qk_rope_head_dim"]
        only = {
            "num_key_value_heads": (heads, "every head has keys and values of its own in latent attention"),
            "head_dim": (rotated, "it can only be qk_rope_head_dim"),
            "qk_head_dim": (hf["qk_nope_head_dim"] + rotated, "it can only be qk_nope_head_dim + qk_rope_head_dim"),
            "attention_bias": (False, "megatron-core's latent attention has no biases"),
            "rope_interleave": (True, "megatron-core's latent attention rotates neighbouring channels"),
        }
        for name, (value, reason) in only.items():
            if hf.get(name) not in (None, value):
                raise refused(name, hf[name], reason)
        widths = {key: int(hf[name]) for name, key in WIDTHS.items()}
        return {"num_attention_heads": heads, "q_lora_rank": None if rank is None else int(rank), **widths}

    def write(model: Values) -> dict[str, Any]:
        heads = model["num_attention_heads"]
        widths = {name: model[key] for name, key in WIDTHS.items()}
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "q_lora_rank": model["q_lora_rank"],
            **widths,
            "attention_bias": False,
        }

    return Part(hf_names, ("num_attention_heads", "q_lora_rank", *WIDTHS.values()), read, write)


def latent_rope() -> Part:
    """As `hf_rope.rope`, of the channels that are rotated."""
    whole = hf_rope.rope()
    return whole._replace(read=lambda hf: whole.read({**hf, "head_dim": hf["qk_rope_head_dim"]}))


def latent_attention_rows(model: Model) -> Rows:
    """The projections of latent attention with the norms before them, and the norm before attention."""
    ours, theirs = f"{MCORE}self_attention.", f"{HF}self_attn."
    pairs = {
        "linear_kv_down_proj.weight": "kv_a_proj_with_mqa.weight",
        "linear_kv_up_proj.layer_norm_weight": "kv_a_layernorm.weight",
        "linear_kv_up_proj.weight": "kv_b_proj.weight",
        "linear_proj.weight": "o_proj.weight",
    }
    if model["q_lora_rank"] is None:
        pairs["linear_q_proj.weight"] = "q_proj.weight"
    else:
        pairs["linear_q_down_proj.weight"] = "q_a_proj.weight"
        pairs["linear_q_up_proj.layer_norm_weight"] = "q_a_layernorm.weight"
        pairs["linear_q_up_proj.weight"] = "q_b_proj.weight"
    return [
        Row(f"{MCORE}input_layernorm.weight", f"{HF}input_layernorm.weight"),
        *(Row(ours + key, theirs + name) for key, name in pairs.items()),
        Ignore(f"{theirs}rotary_emb.inv_freq", "a buffer old files hold; computed from the config"),
    ]


# The name in files of the hub, and the one of transformers' config class, whose default counts when both are absent.
MTP_NAMES = ("num_nextn_predict_layers", "num_mtp_layers")


def _mtp_layers(hf: Values) -> int:
    given = (hf.get(name) for name in MTP_NAMES)
    return int(next((count for count in given if count is not None), 0))


def multi_token_prediction() -> Part:
    """The number of modules behind the last layer that each predict one more token (DeepSeek-V3, arXiv 2412.19437)."""

    def read(hf: Values) -> dict[str, Any]:
        count = _mtp_layers(hf)
        return {"mtp_num_layers": count} if count else {}

    return Part(MTP_NAMES, ("mtp_num_layers",), read, lambda model: {MTP_NAMES[0]: model["mtp_num_layers"] or 0})


def without_missing_predictions(hf: Values, names: Collection[str]) -> Mapping[str, Any]:
    """`hf` without prediction modules if the files (tensors `names`) hold none, and a warning that it is so.

    transformers reads and saves such models without them, but its config.json goes on to count them.
    """
    count, first = _mtp_layers(hf), f"model.layers.{hf.get('num_hidden_layers')}."
    if not count or not names or any(name.startswith(first) for name in names):
        return hf
    warnings.warn(
        f"config.json: {MTP_NAMES[0]}: {count}, but the files have no such layers ({first}*); going on without them",
        stacklevel=3,
    )
    return {**hf, MTP_NAMES[0]: 0}


def prediction_rows(model: Model, layer: Callable[[Model], Rows]) -> Rows:
    """The modules, whose files name them as layers behind the last; `layer` gives the rows of a model's layers.

    They come before those in a table, because a name with a number is found by the first row that fits it.
    """
    layer_rows = layer({**model, "moe_layer_freq": 1})  # with experts, where the model has any
    rows: Rows = []
    output = decoder_rows.EMBEDDING if model["share_embeddings_and_output_weights"] else "lm_head.weight"
    for module in range(model["mtp_num_layers"] or 0):
        ours, theirs = f"mtp.layers.{module}.", f"model.layers.{model['num_layers'] + module}."
        pairs = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}
        rows += [Row(f"{ours}{key}.weight", f"{theirs}{name}.weight") for key, name in pairs.items()]
        rows += [_moved(row, {MCORE: f"{ours}transformer_layer.", HF: theirs}) for row in layer_rows]
        for copy, original in (("embed_tokens", decoder_rows.EMBEDDING), ("shared_head.head", output)):
            reason = "multi-token prediction shares the embedding and the output layer of the model"
            rows.append(Ignore(f"{theirs}{copy}.weight", reason, same_as=original, always=True))
    return rows


def _moved(row: Row | Ignore, prefixes: Mapping[str, str]) -> Row | Ignore:
    """The row for another place: prefixes of its names replaced."""

    def name(old: str) -> str:
        prefix = next(prefix for prefix in prefixes if old.startswith(prefix))
        return prefixes[prefix] + old.removeprefix(prefix)

    if isinstance(row, Ignore):
        return replace(row, hf_name=name(row.hf_name))
    return Row(name(row.mcore_key), [name(one) for one in row.hf_names], row.op)
