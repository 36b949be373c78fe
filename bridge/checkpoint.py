"""Training checkpoints: megatron-core torch_dist folders that are either whole or not there.

    ROOT/.saving_iter_0000100/   being written; removed by the next save if the process died
    ROOT/iter_0000100/           whole: renamed into place, after its files were flushed to disk
    ROOT/latest_checkpointed_iteration.txt   "100": replaced by rename, after that
Old iterations are removed last. Weights lie at the top level of the folder under canonical names, so that the converter
and another layout read them; optimizer state is stored per parameter, independent of the layout it was written with.
"""

import os
import queue
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from bridge import parallel
from bridge.errors import ConfigError
from bridge.optim import schedule
from bridge.platform.random_state import random_state, set_random_state
from bridge.weights.locate import LATEST, CheckpointPath, iteration_directory, locate

FORMAT = 1
SAVING, REMOVING = ".saving_", ".removing_"

# fully_reshardable stores optimizer state per parameter; megatron-core 0.16.1 cannot load its own default format again.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}


class Progress(NamedTuple):
    """How far a run has come. step: optimizer steps, `skipped` among them those left out for infinite gradients.
    data: identity of the samples that `consumed_samples` counts."""

    step: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    data: str = ""


class Trainable(NamedTuple):
    """What a checkpoint saves and restores in place. model: this rank's chunks, wrapped or not."""

    model: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def latest(root: Path) -> CheckpointPath | None:
    """The newest complete checkpoint below `root`, or None before the first save."""
    return locate(root, key="checkpoint") if (root / LATEST).is_file() else None


def save(root: Path, state: Trainable, *, progress: Progress, keep_last: int | None = None) -> Path:
    """Write iteration `progress.step` below `root` and make it the latest. All ranks call this; returns the directory.

    A kill at any moment leaves the previous checkpoint the latest, or this one, whole.
    """
    final = iteration_directory(root, iteration=progress.step)
    unfinished = root / f"{SAVING}{final.name}"
    if parallel.is_main():
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        unfinished.mkdir()
    parallel.barrier()
    weights = _weights(state.model)
    content = weights | {
        "optimizer": state.optimizer.sharded_state_dict(weights, is_loading=False, metadata=dict(METADATA)),
        "random_state": _random_state_of_rank(),
        "scheduler": {"num_steps": state.scheduler.num_steps},
        "progress": progress._asdict(),
        "format": FORMAT,
    }
    _write(unfinished, content)
    if parallel.is_main():
        _publish(unfinished, final)
        if keep_last is not None:
            _retain(final, keep=keep_last)
    parallel.barrier()
    return final


def save_weights(directory: Path, model: Sequence[Any]) -> None:
    """Write the weights of `model` (this rank's chunks, wrapped or not), and nothing else, as a torch_dist folder into
    `directory`, which is empty. All ranks call this."""
    _write(directory, _weights(model))


def _write(directory: Path, content: dict[str, Any]) -> None:
    # megatron-core's own queue lives in a process that first imports torch (2 s); a synchronous save needs no other.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(content, str(directory), content_metadata=METADATA)
    parallel.barrier()


def load(path: CheckpointPath, state: Trainable) -> Progress:
    """Restore `state` in place from a checkpoint written by `save`, whatever layout it was written with.

    Rates and decay follow the present configuration, not the checkpoint. Random generators continue only in the layout
    that wrote them. Raises ConfigError naming weights the checkpoint does not have.
    """
    directory = str(path.directory)
    configured = schedule.configured_groups(state.optimizer)
    weights = _weights(state.model)
    optimizer = state.optimizer.sharded_state_dict(weights, is_loading=True, metadata=dict(METADATA))
    content = weights | {"optimizer": optimizer}
    stored = _stored_keys(directory)
    same_layout = _random_state_of_rank().unique_key in stored
    if same_layout:
        content["random_state"] = _random_state_of_rank()
    loaded = dist_checkpointing.load(_without_missing_extra_state(content, stored, directory), directory)
    for index, chunk in enumerate(unwrap_model(state.model)):
        _load_chunk(chunk, loaded[f"model{index}"])
    with torch.no_grad():  # DistributedOptimizer copies into leaf tensors
        state.optimizer.load_state_dict(loaded["optimizer"])
    schedule.reapply(configured, optimizer=state.optimizer)
    schedule.resume(state.scheduler, num_steps=loaded["scheduler"]["num_steps"])
    if same_layout:
        set_random_state(loaded["random_state"])
    return Progress(**loaded["progress"])


def _weights(model: Sequence[Any]) -> dict[str, Any]:
    chunks = unwrap_model(list(model))
    return {f"model{index}": chunk.sharded_state_dict(metadata=dict(METADATA)) for index, chunk in enumerate(chunks)}


def _random_state_of_rank() -> ShardedObject:
    """This rank's generators, under a key that only the same rank of the same layout asks for."""
    layout = f"tp{parallel.tensor_parallel_size()}pp{parallel.pipeline_size()}cp{parallel.context_parallel_size()}"
    return ShardedObject(f"random_state_{layout}", random_state(), (parallel.world_size(),), (parallel.rank(),))


def _stored_keys(directory: str) -> set[str]:
    """Keys of the tensors and unique keys of the objects in a checkpoint."""
    return set(load_sharded_metadata(directory))


def _without_missing_extra_state(content: dict[str, Any], stored: set[str], directory: str) -> dict[str, Any]:
    """`content` less the kernels' own `_extra_state` the checkpoint lacks; ConfigError for missing weights."""

    def keep(value: Any) -> bool:
        return not (isinstance(value, ShardedObject) and "_extra_state" in value.key and value.unique_key not in stored)

    kept = dict(content)
    missing: list[str] = []
    for name in [name for name in content if name.startswith("model")]:
        kept[name] = {key: value for key, value in content[name].items() if keep(value)}
        missing += [
            value.key
            for value in kept[name].values()
            if isinstance(value, ShardedBase) and not isinstance(value, ShardedObject) and _absent(value, stored)
        ]
    if missing:
        raise ConfigError(
            f"checkpoint: {directory} has no {missing[0]} ({len(missing)} tensors are missing); "
            "it belongs to another model: set another name="
        )
    return kept


def _absent(value: ShardedBase, stored: set[str]) -> bool:
    # A factory writes several tensors under its own key (gate and up of a gated MLP share one).
    return value.key not in stored and not isinstance(value, ShardedTensorFactory)


def _load_chunk(chunk: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    result = chunk.load_state_dict(weights, strict=False)
    wrong = [key for key in (*result.missing_keys, *result.unexpected_keys) if "_extra_state" not in key]
    assert not wrong, f"not restored: {wrong}"


def _publish(unfinished: Path, final: Path) -> None:
    """Flush `unfinished` to disk, give it its name, then point `latest` at it: in this order, each step atomic."""
    for file in unfinished.iterdir():
        _flush(file)
    _flush(unfinished)
    if final.exists():  # whole, but its save was killed before `latest` was moved
        _remove(final)
    unfinished.rename(final)
    pointer = final.parent / f"{SAVING}latest"
    pointer.write_text(str(int(final.name.removeprefix("iter_"))))
    _flush(pointer)
    pointer.replace(final.parent / LATEST)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retain(newest: Path, *, keep: int) -> None:
    # A later iteration can lie beside `newest` when a save was killed before `latest` moved: it is not counted.
    saved = sorted(directory for directory in newest.parent.glob("iter_*") if directory.name <= newest.name)
    for directory in saved[:-keep]:
        _remove(directory)


def _remove(directory: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a kill leaves no half of one under it."""
    nameless = directory.with_name(f"{REMOVING}{directory.name}")
    directory.rename(nameless)
    shutil.rmtree(nameless)


def _remove_leftovers(root: Path) -> None:
    for prefix in (SAVING, REMOVING):
        for leftover in root.glob(f"{prefix}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
