"""Multi-latent attention in the configs and files of the DeepSeek line."""

from typing import Any

from bridge.models.hf import rope as hf_rope
from bridge.models.hf.decoder_rows import HF, MCORE, Model, Rows
from bridge.models.hf.fields import Part, Values, refused
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
