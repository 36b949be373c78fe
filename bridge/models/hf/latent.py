"""Multi-latent attention in the configs of the DeepSeek line."""

from typing import Any

from bridge.models.hf import rope as hf_rope
from bridge.models.hf.fields import Part, Values, refused

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
