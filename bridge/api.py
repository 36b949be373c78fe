"""The public Python API: models of this process from a directory, and their weights back in Hugging Face form."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge import parallel as groups
from bridge.config.annotation import DTYPES
from bridge.config.routing import Routed, route
from bridge.convert.export import write_assets
from bridge.convert.initial import load_initial, model_section, read_section, stored_dtype
from bridge.errors import BridgeError, ConfigError, ConversionError, did_you_mean
from bridge.models import family, gpt
from bridge.models.gpt import GPT
from bridge.weights import live, locate, shards
from bridge.weights.hf_files import HfWriter, parse_size
from bridge.weights.ledger import plan
from bridge.weights.output import new_directory
from bridge.weights.spec import TensorSpec

SIZES = {
    "tensor_model_parallel_size": groups.tensor_parallel_size,
    "pipeline_model_parallel_size": groups.pipeline_size,
    "context_parallel_size": groups.context_parallel_size,
}


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
    weights_dtype = stored_dtype(path) if dtype is None else _dtype(dtype)
    made_groups = _join_groups(routed)
    try:
        model = gpt.build(routed, dtype=weights_dtype)
        load_initial(model, path, routed, key="path")
    except BaseException:
        if made_groups:
            groups.teardown()
        raise
    assets = path if locate.is_hf(path) else locate.locate(path, key="path").root / locate.HF_ASSETS
    for chunk in model:
        chunk.assets = assets
    return model


def export_weights(model: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a sharded model by Hugging Face name, `(name, whole tensor)`, on every rank, one at a time.

    The tensors keep the model's dtype and device. All ranks must run through the iterator together. `model` comes from
    `load_model` or `bridge.models.gpt.build`, wrapped (DDP, Float16Module) or not.
    """
    routed = _routed(model)
    table = family.by_name(routed.family).table(model_section(routed))
    yield from live.export_weights(model, table=table, vocab_size=routed.gpt["vocab_size"])


def save_hf(
    model: Sequence[torch.nn.Module], path: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB"
) -> None:
    """Write a Hugging Face directory from a sharded model; rank 0 writes, all ranks call.

    Tokenizer and generation files come from where `load_model` loaded the model. The directory appears whole or not at
    all. Raises ConversionError on every rank when it exists and `overwrite` is false.
    """
    size = parse_size(max_shard_size)
    section = model_section(_routed(model))
    specs = _specs(model, section)
    with ExitStack() as stack:
        writer, error = None, None
        if groups.is_main():
            try:
                directory = stack.enter_context(new_directory(path, overwrite=overwrite, key="path"))
                writer = HfWriter(directory, specs, max_shard_size=size)
            except BridgeError as refused:
                error = refused
        refusals = shards.all_gather(error and str(error))
        if refusals[0]:
            raise ConversionError(refusals[0])
        for name, tensor in export_weights(model):
            if writer is not None:
                writer.write(name, tensor)
        if writer is not None:
            writer.close()
            assets = getattr(shards.unwrap(model[0]), "assets", None)
            write_assets(directory, section=section, assets=assets, specs=specs.values())
    groups.barrier()


def _specs(model: Sequence[torch.nn.Module], section: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Name, dtype and shape of what `export_weights` will yield, without gathering. A collective."""
    routed = _routed(model)
    table = family.by_name(routed.family).table(section)
    moves = plan(table, shards.targets(model), vocab_size=routed.gpt["vocab_size"])
    specs = {
        name: TensorSpec(move.target.dtype, shape)
        for move in moves
        for name, shape in zip(move.hf_names, move.hf_shapes, strict=True)
    }
    return specs | {copy: specs[original] for copy, original in table.copies().items()}


def _routed(model: Sequence[torch.nn.Module]) -> Routed:
    return shards.unwrap(model[0]).routed


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    return getattr(torch, DTYPES[dtype])


def _join_groups(routed: Routed) -> bool:
    """Make the process groups (True), or check that those there are have the sizes asked for (False)."""
    asked = {name: routed.transformer.get(name, 1) for name in SIZES}
    if groups.is_initialized():
        for name, size in SIZES.items():
            if size() != asked[name]:
                raise ConfigError(f"parallelism.{name}: {asked[name]}, but this process group has {size()}; set that")
        return False
    needed, ranks = math.prod(asked.values()), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % needed:
        raise ConfigError(
            f"parallelism: needs a multiple of {needed} processes, there are {ranks}; start with torchrun"
        )
    groups.initialize(routed.transformer)
    return True
