"""Loading: a checkpoint of any layout restored into the present one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from bridge import parallel
from bridge.checkpoint import content, keys
from bridge.checkpoint.content import METADATA, Position, Trainable
from bridge.checkpoint.optimizer_state import OptimizerState
from bridge.errors import ConfigError
from bridge.optim import schedule
from bridge.platform.random_state import set_random_state
from bridge.weights import common_state
from bridge.weights.dist_files import stored_keys
from bridge.weights.locate import CheckpointPath

SHARDING = "distrib_optim_sharding_type"
WEIGHTS_ONLY = "init.path={path} and another name= start from its weights alone"


def load(path: CheckpointPath, state: Trainable) -> Position:
    """Restore `state` in place from a checkpoint written by `save`, whatever layout it was written with.

    Rates and decay follow the present configuration, not the checkpoint; what differs is printed. Random generators
    continue only in the layout that wrote them. Raises ConfigError naming what the checkpoint lacks or has too much, or
    when its format is bound to the layout that wrote it.
    """
    directory = path.directory
    stored = stored_keys(directory)
    _check_format(directory, stored, now=content.layout(state))
    weights = content.weights(state.model)
    optimizer = OptimizerState(state.optimizer, weights, metadata=METADATA, is_loading=True)
    wanted = keys.without_missing_extra_state(weights, stored) | {"optimizer_state": optimizer.tensors}
    _check_same(keys.differences(wanted, stored), directory)
    generators = content.random_state_of_rank()
    same_layout = generators.unique_key in stored
    if same_layout:
        wanted["random_state"] = generators
    loaded = dist_checkpointing.load(wanted, str(directory))
    for index, chunk in enumerate(unwrap_model(state.model)):
        _load_chunk(chunk, loaded[f"model{index}"])
    optimizer.restore(loaded["optimizer_state"], loaded["optimizer"])
    schedule.resume(state.scheduler, num_steps=loaded["scheduler"]["num_steps"])
    if same_layout:
        set_random_state(loaded["random_state"])
    _say_what_changed(loaded, state, same_generators=same_layout)
    return Position(**loaded["progress"])


def _check_same(differences: keys.Differences, directory: Path) -> None:
    if differences.kinds == {keys.OPTIMIZER}:
        raise ConfigError(
            f"checkpoint: {directory} was saved with a different optimizer: {differences}; use that optimizer, or "
            f"{WEIGHTS_ONLY.format(path=directory)}"
        )
    if differences.kinds:
        raise ConfigError(
            f"checkpoint: {directory} was saved with a different model: {differences}; use that model, or set "
            "another name="
        )


def _check_format(directory: Path, stored: frozenset[str], *, now: Mapping[str, Any]) -> None:
    """ConfigError for checkpoints of other programs, and for those whose optimizer state is bound to a layout."""
    common = common_state.read(directory)
    sharding = _mapping(common.get("content_metadata")).get(SHARDING)
    bound = any(key.startswith("optimizer.distributed.") for key in stored)
    if bound or sharding not in (None, METADATA[SHARDING]):
        theirs = _mapping(common.get("layout")) or common_state.megatron_args(directory)
        raise ConfigError(
            f"checkpoint: {directory} keeps its optimizer state in the format {sharding!r}, bound to the layout that "
            f"wrote it ({_shown(theirs, now)}; now {_shown(now, now)}); save it there with "
            f"--dist-ckpt-optim-fully-reshardable, or {WEIGHTS_ONLY.format(path=directory)}"
        )
    if common.get("format") != content.FORMAT:
        raise ConfigError(
            f"checkpoint: {directory} is not a training checkpoint of this program (format {common.get('format')!r}, "
            f"not {content.FORMAT}); {WEIGHTS_ONLY.format(path=directory)}"
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(layout: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    sizes = [f"{name}={layout[name]}" for name in names if name.endswith("_size") and layout.get(name) is not None]
    return " ".join(sizes) or "not recorded in it"


def _load_chunk(chunk: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    result = chunk.load_state_dict(weights, strict=False)
    wrong = [key for key in (*result.missing_keys, *result.unexpected_keys) if "_extra_state" not in key]
    assert not wrong, f"not restored: {wrong}"


def _say_what_changed(loaded: Mapping[str, Any], state: Trainable, *, same_generators: bool) -> None:
    """One line each for layout and settings, where a resumed run's differ from those of the run that was stopped."""
    if not parallel.is_main():
        return
    if changed := content.changes(loaded["layout"], content.layout(state)):
        anew = "" if same_generators else "; random generators start anew"
        print(f"layout since the checkpoint: {changed}{anew}", flush=True)
    if changed := content.changes(loaded["settings"], schedule.settings(state.scheduler, state.optimizer)):
        print(f"settings since the checkpoint: {changed}; the new ones apply", flush=True)
