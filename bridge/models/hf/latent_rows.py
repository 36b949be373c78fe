"""Rows of multi-latent attention in the files of the DeepSeek line."""

from bridge.models.hf.decoder_rows import HF, MCORE, Model, Rows
from bridge.weights.table import Ignore, Row


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
