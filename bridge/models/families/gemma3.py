"""Gemma 3, text: Gemma 2 with normed queries and keys instead of a cap on scores, five layers with the window to one
without, and a rotary embedding for each kind."""

from bridge.models.families import gemma2
from bridge.models.family import Family
from bridge.models.hf.fields import only, unread, window_by_pattern
from bridge.models.hf.rope import rope_and_local_rope

PERIOD = "sliding_window_pattern"

FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    hf_defaults={
        **gemma2.DEFAULTS,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    parts=(
        *gemma2.PARTS,
        only("attn_logit_softcapping", None),  # transformers' attention takes no notice of it
        rope_and_local_rope(window_by_pattern(6, field=PERIOD, unused=4096), theta=1e6, local_theta=1e4),
        unread(f"_{PERIOD}"),  # what transformers 5 writes and does not read again
    ),
    constants={**gemma2.CONSTANTS, "qk_layernorm": True},
    rows=gemma2.table,
)
