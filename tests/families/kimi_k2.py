"""Kimi-K2, by DeepSeek-V3's class."""

from tests.families import deepseek_v3
from tests.families.deepseek_v3 import REFUSED, SHAPES, V3

__all__ = ["REFUSED", "SHAPES"]

MODEL_TYPE = "deepseek_v3"
CHANGES = {**deepseek_v3.CHANGES, "topk_group": 1}  # there is one group
VARIANTS = {
    "kimi_k2": {**V3, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    "kimi_k2_prediction": {**V3, "n_group": 1, "topk_group": 1},
}
SIZES = {"kimi_k2": 1_026_408_209_408}
