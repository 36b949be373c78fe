"""Loading: a checkpoint of any layout restored into the present one."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.utils import unwrap_model

from bridge.checkpoint import content
from bridge.checkpoint.content import METADATA, Progress, Trainable
from bridge.errors import ConfigError
from bridge.optim import schedule
from bridge.platform.random_state import set_random_state
from bridge.weights.locate import CheckpointPath


def load(path: CheckpointPath, state: Trainable) -> Progress:
    """Restore `state` in place from a checkpoint written by `save`, whatever layout it was written with.

    Rates and decay follow the present configuration, not the checkpoint. Random generators continue only in the layout
    that wrote them. Raises ConfigError naming weights the checkpoint does not have.
    """
    directory = str(path.directory)
    configured = schedule.configured_groups(state.optimizer)
    weights = content.weights(state.model)
    optimizer = state.optimizer.sharded_state_dict(weights, is_loading=True, metadata=dict(METADATA))
    wanted = weights | {"optimizer": optimizer}
    stored = _stored_keys(directory)
    same_layout = content.random_state_of_rank().unique_key in stored
    if same_layout:
        wanted["random_state"] = content.random_state_of_rank()
    loaded = dist_checkpointing.load(_without_missing_extra_state(wanted, stored, directory), directory)
    for index, chunk in enumerate(unwrap_model(state.model)):
        _load_chunk(chunk, loaded[f"model{index}"])
    with torch.no_grad():  # DistributedOptimizer copies into leaf tensors
        state.optimizer.load_state_dict(loaded["optimizer"])
    schedule.reapply(configured, optimizer=state.optimizer)
    schedule.resume(state.scheduler, num_steps=loaded["scheduler"]["num_steps"])
    if same_layout:
        set_random_state(loaded["random_state"])
    return Progress(**loaded["progress"])


def _stored_keys(directory: str) -> set[str]:
    """Keys of the tensors and unique keys of the objects in a checkpoint."""
    return set(load_sharded_metadata(directory))


def _without_missing_extra_state(wanted: dict[str, Any], stored: set[str], directory: str) -> dict[str, Any]:
    """`wanted` less the kernels' own `_extra_state` the checkpoint lacks; ConfigError for missing weights."""

    def keep(value: Any) -> bool:
        return not (isinstance(value, ShardedObject) and "_extra_state" in value.key and value.unique_key not in stored)

    kept = dict(wanted)
    missing: list[str] = []
    for name in [name for name in wanted if name.startswith("model")]:
        kept[name] = {key: value for key, value in wanted[name].items() if keep(value)}
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
