"""Training checkpoints: megatron-core torch_dist folders that any layout and the converter read."""

from bridge.checkpoint.content import Progress, Trainable
from bridge.checkpoint.files import latest
from bridge.checkpoint.loading import load
from bridge.checkpoint.saving import save, save_weights

__all__ = ["Progress", "Trainable", "latest", "load", "save", "save_weights"]
