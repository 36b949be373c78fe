"""Models of this process from a directory, and their weights back in Hugging Face form, in one call each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge import parallel
from bridge.api import saving
from bridge.api.tasks import describe, stream, tasks
from bridge.config import effect
from bridge.config.annotation import DTYPES
from bridge.config.routing import route
from bridge.errors import ConfigError, did_you_mean
from bridge.models import gpt
from bridge.models.gpt import GPT
from bridge.sources.load import load_initial, read_section, stored_dtype
from bridge.weights import locate, shards


def load_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, parallelism: Mapping[str, Any] | None = None
) -> list[GPT]:
    """This rank's megatron-core model chunks (one unless virtual pipeline stages are used) with the weights in `path`.

    path: a Hugging Face directory or a Megatron checkpoint (run, checkpoints, iteration) of any layout.
    dtype: torch.dtype, "fp32", "bf16" or "fp16"; None: the one most of the stored weights have.
    parallelism: megatron-core's fields, `{"tensor_model_parallel_size": 2}`. Process groups are made from it and from
    torchrun's environment unless they exist; without torchrun this is a single process.
    Raises ConfigError, ConversionError (both bridge.errors.BridgeError).
    """
    path = Path(path).expanduser().absolute()
    routed = route({"model": read_section(path, key="path"), "parallelism": dict(parallelism or {})})
    effect.check(routed)
    weights_dtype = stored_dtype(path) if dtype is None else parse_dtype(dtype)
    with parallel.joined(routed):
        model = gpt.build(routed, dtype=weights_dtype, seed=None)
        load_initial(model, path, routed, key="path")
    assets = path if locate.is_hf(path) else locate.locate(path, key="path").root / locate.HF_ASSETS
    for chunk in model:
        chunk.assets = assets
    return model


def export_weights(model: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a sharded model by Hugging Face name, `(name, whole tensor)`, on every rank, one at a time.

    The tensors keep the model's dtype and device. All ranks must run through the iterator together. `model` comes from
    `load_model` or `bridge.models.gpt.build`, wrapped (DDP, Float16Module) or not.
    """
    yield from stream(model, tasks(model, describe(model)))


def save_hf(
    model: Sequence[torch.nn.Module], path: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB"
) -> None:
    """Write a Hugging Face directory from a sharded model; rank 0 writes, all ranks call.

    Tokenizer and generation files come from where `load_model` loaded the model. The directory appears whole or not at
    all. Raises ConversionError on every rank when it exists and `overwrite` is false.
    """
    assets = saving.Assets(getattr(shards.unwrap(model[0]), "assets", None))
    saving.save_hf(model, path, describe(model), assets=assets, overwrite=overwrite, max_shard_size=max_shard_size)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch.dtype as it is, or by its name in a configuration (bf16) or in torch (bfloat16)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    name = DTYPES.get(dtype, dtype)
    if name not in DTYPES.values() or name == "uint8":
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    return getattr(torch, name)
