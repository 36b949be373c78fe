"""The public Python API. Every name here is also a name of `bridge`, which loads it with its first use."""

from bridge.api.auto_bridge import AutoBridge
from bridge.api.models import export_weights, load_model, save_hf
from bridge.api.provider import Provider
from bridge.api.tasks import ConversionTask, HFWeightTuple
from bridge.api.token_logprobs import logprobs, logprobs_from_logits
from bridge.api.training import forward_backward

__all__ = [
    "AutoBridge",
    "ConversionTask",
    "HFWeightTuple",
    "Provider",
    "export_weights",
    "forward_backward",
    "load_model",
    "logprobs",
    "logprobs_from_logits",
    "save_hf",
]
