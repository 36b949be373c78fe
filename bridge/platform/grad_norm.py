"""Norm of a gradient on a CPU. torch adds up a whole tensor's squares in 32 bits there: the norm of 30 million numbers
is 0.2% off, of the halves that tensor parallelism makes of them less, so that clipping depended on the layout."""

import math
from typing import Any

import torch

ROW = 4096  # elements whose squares are added up in 32 bits


def install() -> None:
    """Let megatron-core clip gradients, and report their norm, by `l2_norm`."""
    import megatron.core.optimizer.clip_grads as clip_grads_module

    clip_grads: Any = clip_grads_module
    clip_grads.l2_norm_impl = l2_norm


def l2_norm(
    chunk_size: int, overflow: Any, tensor_lists: list[list[torch.Tensor]], *_: Any
) -> tuple[torch.Tensor, None]:
    """L2 norm of all tensors together, fp32 of shape [1]; arguments as those of amp_C.multi_tensor_l2norm."""
    squares = sum(_square(tensor) for tensors in tensor_lists for tensor in tensors)
    return torch.tensor([math.sqrt(squares)], dtype=torch.float32), None


def _square(tensor: torch.Tensor) -> float:
    flat = tensor.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=torch.float32).double()
    rest = flat[whole:].double()
    return float(rows @ rows + rest @ rest)
