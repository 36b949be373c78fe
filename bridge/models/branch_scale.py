"""A constant factor on what each branch adds to the residual stream (Granite, IBM 2024)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def use(layer: Any, config: Any) -> None:
    """`residual_multiplier`: residual + multiplier * dropout(output + bias), behind attention and behind the MLP.

    Every rank scales its own part of the residual stream, so no layout changes it.
    """
    if config.residual_multiplier == 1.0:
        return
    parts = layer.submodules
    parts.self_attn_bda = _scaled(parts.self_attn_bda, config.residual_multiplier)
    parts.mlp_bda = _scaled(parts.mlp_bda, config.residual_multiplier)


def _scaled(bias_dropout_add: Callable[..., Any], multiplier: float) -> Callable[..., Any]:
    """megatron-core's `get_bias_dropout_add` for a scaled output and bias: dropout commutes with the factor."""

    def get_scaled_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor]:
        add = bias_dropout_add(training, fused)

        def scaled(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
            output, bias = output_with_bias
            bias = None if bias is None else bias * multiplier
            return add((output * multiplier, bias), residual, probability)

        return scaled

    return get_scaled_bias_dropout_add
