"""GPT-OSS."""

from tests.rope_variants import rope

YARN = rope("yarn_options")
PLAIN = {
    "head_dim": 16,
    "intermediate_size": 40,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "swiglu_limit": 0.8,
    **YARN,
}
VARIANTS = {
    "gpt_oss": PLAIN,
    "gpt_oss_without_attention_bias": {**PLAIN, "attention_bias": False},
    "gpt_oss_tied": {**PLAIN, "tie_word_embeddings": True},
    "gpt_oss_no_window": {**PLAIN, "sliding_window": 128, "layer_types": ["full_attention"] * 4},
    "gpt_oss_default_rope": {**PLAIN, "rope_parameters": None},
}
CHANGES = {
    "num_local_experts": 4,
    "num_experts_per_tok": 3,
    "swiglu_limit": 0.3,
    "router_aux_loss_coef": 0.5,
    "output_router_logits": True,
    "attention_bias": False,
}
SHAPES = {"num_local_experts"}
REFUSED = {"swiglu_alpha": 1.5, "hidden_act": "gelu"}
SIZES = {"gpt_oss_20b": 20_914_757_184, "gpt_oss_120b": 116_829_156_672}
