"""Qwen2."""

from tests.rope_variants import rope

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
BASE = {"use_mrope": True, "dual_chunk_attention_config": {"chunk_size": 2, "local_size": 1}}
UNREAD = list(BASE)
VARIANTS = {
    "qwen2": {},
    "qwen2_tied": {"tie_word_embeddings": True},
    "qwen2_window": WINDOW,
    "qwen2_yarn": rope("yarn"),
}
ON = {**WINDOW, "layer_types": None}
SIZES = {"qwen2_5_0_5b": 494_032_768, "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_7b": 7_615_616_512}
