"""DeepSeek-V3 and R1, and Moonlight."""

from tests.families.deepseek_v2 import LATENT, LATENT_CHANGES, LATENT_REFUSED, MSCALE, SHAPES, YARN

__all__ = ["CHANGES", "REFUSED", "SHAPES", "SIZES", "VARIANTS"]

ROUTING = {"n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
V3 = {**LATENT, **ROUTING}

VARIANTS = {
    "deepseek_v3": V3,  # with one prediction module, which transformers' class defaults to
    "deepseek_v3_yarn": {**V3, "rope_parameters": MSCALE, "norm_topk_prob": False, "num_nextn_predict_layers": 2},
    "deepseek_v3_plain_yarn": {**V3, "rope_parameters": YARN},
    "deepseek_v3_moonlight": {**V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    | {"num_nextn_predict_layers": 0},
    "deepseek_v3_tied": {**V3, "first_k_dense_replace": 0, "tie_word_embeddings": True},
    "deepseek_v3_dense": {**V3, "first_k_dense_replace": 4, "num_nextn_predict_layers": 0},
}
CHANGES = {**LATENT_CHANGES, "norm_topk_prob": False, "num_mtp_layers": 2}
REFUSED = {**LATENT_REFUSED, "rope_interleave": False}
SIZES = {"deepseek_v3": 682_636_472_320, "moonlight_16b_a3b": 15_960_108_544}
