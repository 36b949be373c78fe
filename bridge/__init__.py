"""Hydra configs become megatron-core models, a distributed setup and a training loop; weights move to and from HF.

`import bridge` costs no torch: the functions below load with their first use, `compose` and `train` without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.api import (
        AutoBridge,
        export_weights,
        forward_backward,
        load_model,
        logprobs,
        logprobs_from_logits,
        save_hf,
    )
    from bridge.launch.notebook import compose, train

__all__ = [
    "AutoBridge",
    "compose",
    "export_weights",
    "forward_backward",
    "load_model",
    "logprobs",
    "logprobs_from_logits",
    "save_hf",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    if name in ("compose", "train"):
        from bridge.launch import notebook

        return getattr(notebook, name)
    from bridge import platform

    platform.prepare()  # before api imports megatron-core
    from bridge import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
