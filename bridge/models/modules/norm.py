"""The normalisation layers used without Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge import platform


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm times 1 + weight, computed in float32 and rounded once, at the end (transformers' GemmaRMSNorm)."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).type_as(x)


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm times 1 + weight, plus bias, computed in float32 (transformers' NemotronLayerNorm1P)."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), bias, self.eps).type_as(x)


# By config.normalization and config.layernorm_zero_centered_gamma.
KINDS: dict[tuple[str, bool], type[torch.nn.RMSNorm] | type[torch.nn.LayerNorm]] = {
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): ZeroCenteredRMSNorm,
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): ZeroCenteredLayerNorm,
}


class Norm:
    """The norm that config.normalization and config.layernorm_zero_centered_gamma ask for, in config.params_dtype.

    megatron-core's WrappedTorchNorm refuses sequence parallelism. Its reason is the gradient: each tensor rank sees
    part of the sequence, so the gradients of the weight must be summed over ranks. finalize_model_grads does so for
    parameters marked `sequence_parallel`, which is all this class adds. A class, not a function, because
    megatron-core's build_module instantiates classes and returns functions uncalled.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        kind = KINDS[config.normalization, config.layernorm_zero_centered_gamma]
        device = None if config.use_cpu_initialization else platform.device()
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
