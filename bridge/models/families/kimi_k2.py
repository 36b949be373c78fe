"""Kimi-K2: DeepSeek-V3's class under a model_type of its own, which transformers does not know."""

from dataclasses import replace

from bridge.models.families import deepseek_v3

FAMILY = replace(deepseek_v3.FAMILY, model_type="kimi_k2", class_of="deepseek_v3")
