"""The normalisation layer used without Transformer Engine."""

from typing import Any

import torch

from bridge import platform


class Norm:
    """torch.nn.RMSNorm or torch.nn.LayerNorm, as config.normalization says, in config.params_dtype.

    megatron-core's WrappedTorchNorm refuses sequence parallelism. Its reason is the gradient: each tensor rank sees
    part of the sequence, so the gradients of the weight must be summed over ranks. finalize_model_grads does so for
    parameters marked `sequence_parallel`, which is all this class adds. A class, not a function, because
    megatron-core's build_module instantiates classes and returns functions uncalled.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        device = None if config.use_cpu_initialization else platform.device()
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
