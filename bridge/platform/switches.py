"""Fields of megatron-core's that Transformer Engine reads from the environment instead."""

import os
from collections.abc import Mapping
from typing import Any


def set_switches(fields: Mapping[str, Any]) -> None:
    """Tell Transformer Engine what `fields`, values of TransformerConfig by name, say. Before its layers are built.

    megatron-core compares the two in every attention layer and stops where they differ (its
    extensions/transformer_engine.py, TEDotProductAttention).
    """
    os.environ["NVTE_APPLY_QK_LAYER_SCALING"] = "1" if fields.get("apply_query_key_layer_scaling") else "0"
