"""Hydra 1.3 does in composing what it has done before; here once: half the CPU time of a run, 0.1 s, and of a sweep.

It composes a command line twice, the first time to read nothing but hydra.mode: what that made is taken for the second.
And it parses every option's file anew for each job of a sweep, and for the check of each.
"""

import functools
import os
import pickle
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig

_MODES = tuple(f"hydra.mode={mode.name}" for mode in RunMode)  # what Hydra adds when the configuration names no mode


class _Kept(NamedTuple):
    """What was composed for hydra.mode, and of what."""

    asked: tuple[Any, ...]
    overrides: tuple[str, ...]
    config: DictConfig


@functools.cache
def from_now_on() -> None:
    """From now on Hydra composes a command line once and parses a file once, and again when it has changed.

    Comes after whatever else changes what Hydra loads: what that makes is kept, and what it refuses is not.
    """
    _compose_once()
    _parse_once()


def _compose_once() -> None:
    composing: Any = ConfigLoaderImpl.load_configuration

    def load(
        self: Any,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        asked = (config_name, os.getcwd())
        kept, self.kept_of_mode = getattr(self, "kept_of_mode", None), None
        if kept is not None and kept.asked == asked and _are(overrides, kept.overrides):
            return _completed(kept, overrides, run_mode=run_mode, from_shell=from_shell)
        config: DictConfig = composing(self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        # Where an option is still to be chosen, a run is refused and a sweep is not.
        if not validate_sweep_overrides and "???" not in config.hydra.runtime.choices.values():
            self.kept_of_mode = _Kept(asked, tuple(overrides), config)
        return config

    loader: Any = ConfigLoaderImpl
    loader.load_configuration = load


def _are(overrides: list[str], before: tuple[str, ...]) -> bool:
    added = overrides[len(before) :]
    return tuple(overrides[: len(before)]) == before and (not added or (len(added) == 1 and added[0] in _MODES))


def _completed(kept: _Kept, overrides: list[str], *, run_mode: RunMode, from_shell: bool) -> DictConfig:
    """What composing all over again would have made, with its checks of what may be swept."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
    for override in parsed[len(kept.overrides) :]:
        ConfigLoaderImpl._apply_overrides_to_config([override], kept.config)
        kept.config.hydra.overrides.hydra.append(override.input_line)
    return kept.config


def _parse_once() -> None:
    Plugins.instance()  # Hydra imports its classes anew, so that those of its modules are others
    source: Any = SourcesRegistry.instance().resolve("file")
    loading = source.load_config
    parsed: dict[tuple[Any, ...], bytes] = {}  # Hydra changes what it gets

    def load_config(self: ConfigSource, config_path: str) -> ConfigResult:
        file = os.path.join(self.path, self._normalize_file_name(config_path))
        try:
            found = os.stat(file)
        except OSError:
            return loading(self, config_path)
        key = (file, self.provider, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if key not in parsed:
            parsed[key] = pickle.dumps(loading(self, config_path))
        result: ConfigResult = pickle.loads(parsed[key])
        return result

    source.load_config = load_config
