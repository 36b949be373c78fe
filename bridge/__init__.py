"""Hydra configs become megatron-core models, a distributed setup and a training loop; weights move to and from HF.

`import bridge` costs no torch: the functions below load with their first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.api import AutoBridge, export_weights, load_model, logprobs, logprobs_from_logits, save_hf

__all__ = ["AutoBridge", "export_weights", "load_model", "logprobs", "logprobs_from_logits", "save_hf"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    from bridge import platform

    platform.prepare()  # before api imports megatron-core
    from bridge import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
