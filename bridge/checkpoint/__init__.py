"""Training checkpoints: megatron-core torch_dist folders that any layout and the converter read.

The names below load with their first use: megatron-core must be prepared (`bridge.platform`) before it is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.checkpoint.content import Position, Trainable
    from bridge.checkpoint.resuming import has_checkpoint, resume, stands_at
    from bridge.checkpoint.saving import Saved, Saver, save_weights

__all__ = ["Position", "Saved", "Saver", "Trainable", "has_checkpoint", "resume", "save_weights", "stands_at"]

_HOMES = {
    "content": ("Position", "Trainable"),
    "resuming": ("has_checkpoint", "resume", "stands_at"),
    "saving": ("Saved", "Saver", "save_weights"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bridge.checkpoint.{home}"), name)
    raise AttributeError(f"module 'bridge.checkpoint' has no attribute {name!r}")
