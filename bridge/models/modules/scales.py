"""Constant factors and caps that megatron-core lacks: on the embedding, on what a branch adds to the residual stream,
and on the logits (Gemma 2, Granite).

Those at the two ends of the decoder are forward hooks, so every path has them: training, logits, generation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def apply_at_both_ends(model: Any) -> None:
    """The factor on the embedding, the factor and the cap on the logits that a GPT's config asks for."""
    config = model.config
    if model.pre_process and config.embedding_multiplier != 1.0:
        scale_embeddings(model.embedding.word_embeddings, config.embedding_multiplier)
    if model.post_process and config.final_logit_softcapping is not None:
        cap_logits(model.output_layer, config.final_logit_softcapping)
    if model.post_process and config.logits_scaling != 1.0:
        divide_logits(model.output_layer, config.logits_scaling)


def scale_embeddings(embedding: torch.nn.Module, multiplier: float) -> None:
    """Multiply what a word embedding returns, not its weight, which the output layer may share.

    The factor is rounded to the dtype of the weight, as transformers' GemmaTextScaledWordEmbedding has it.
    """

    def scaled(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(multiplier).to(output.dtype)

    embedding.register_forward_hook(scaled)


def scale_branches(layer: Any, config: Any) -> None:
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


def divide_logits(output_layer: torch.nn.Module, divisor: float) -> None:
    """`logits_scaling`: a forward hook divides what the output layer returns, on every path that asks for logits."""

    def divided(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        return logits / divisor, bias

    output_layer.register_forward_hook(divided)


def cap_logits(output_layer: torch.nn.Module, cap: float) -> None:
    """Bend the logits of an output layer into (-cap, cap): cap * tanh(logits / cap)."""

    def capped(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        return softcap(logits, cap), bias

    output_layer.register_forward_hook(capped)


def softcap(values: Tensor, cap: float) -> Tensor:
    """cap * tanh(values / cap): nearly the identity up to about cap / 2 (Gemma Team 2024, arXiv 2408.00118)."""
    return cap * torch.tanh(values / cap)
