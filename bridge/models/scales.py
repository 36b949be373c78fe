"""A factor on what enters the decoder, a divisor and a cap on what leaves it: lines of architectures GPTModel lacks.

They are forward hooks of the two modules, so every path through these has them: training, logits, generation.
"""

from typing import Any

import torch
from torch import Tensor


def scale_embeddings(embedding: torch.nn.Module, multiplier: float) -> None:
    """Multiply what a word embedding returns, not its weight, which the output layer may share.

    The factor is rounded to the dtype of the weight, as transformers' GemmaTextScaledWordEmbedding has it.
    """

    def scaled(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(multiplier).to(output.dtype)

    embedding.register_forward_hook(scaled)


def divide_logits(output_layer: torch.nn.Module, divisor: float) -> None:
    """Divide what the output layer returns (Granite's logits_scaling)."""

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
