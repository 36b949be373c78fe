"""Seed-OSS."""

PLAIN = {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0}
VARIANTS = {
    "seed_oss": {**PLAIN, "attention_dropout": 0.1, "residual_dropout": 0.1},
    "seed_oss_tied": {**PLAIN, "tie_word_embeddings": True},
    "seed_oss_output_bias": {**PLAIN, "attention_out_bias": True},
    "seed_oss_mlp_bias": {**PLAIN, "mlp_bias": True},
    "seed_oss_all_bias": {**PLAIN, "attention_out_bias": True, "mlp_bias": True},
    "seed_oss_no_bias": {**PLAIN, "attention_bias": False},
}
CHANGES = {"attention_bias": False, "attention_out_bias": True, "residual_dropout": 0.3}
SHAPES = ["attention_out_bias"]
SIZES = {"seed_oss_36b": 36_151_104_512}
