"""Two files of one option are refused: Hydra takes the first on its search path, not a word of the other.

The shipped files come before those of --config-dir, so that a user's model/gpt2.yaml would train the shipped gpt2.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.plugins.config_source import ConfigResult, ConfigSource

from bridge.errors import ConfigError

_ABSENT = "provider=.*, path=.* is not available"  # Hydra's warning of a directory in hydra.searchpath


def check_all() -> None:
    """From now on Hydra raises ConfigError for an option in two files that differ, or in one it cannot find."""
    _check_each()
    warnings.filterwarnings("error", message=_ABSENT, category=UserWarning)


@functools.cache
def _check_each() -> None:
    loading = ConfigRepository.load_config

    def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        _check(self.get_sources(), config_path)
        return loading(self, config_path)

    repository: Any = ConfigRepository
    repository.load_config = load_config


def _check(sources: Sequence[ConfigSource], option: str) -> None:
    """`option`: GROUP/NAME, or the NAME of a primary file."""
    files = [source for source in sources if source.scheme() != "structured" and source.is_config(option)]
    group, _, name = option.rpartition("/")
    for source in [] if files else sources:
        unread = Path(source.path, f"{option}.yml")
        if source.scheme() == "file" and unread.is_file():
            raise ConfigError(f"{unread}: Hydra reads .yaml files only; rename it to {name}.yaml")
    for other in files[1:]:
        if _content(other, option) != _content(files[0], option):
            choice = f"{group}={name}" if group else name
            chosen_by = f"{group}=" if group else "--config-name"
            raise ConfigError(
                f"{choice}: {_place(other, option)} is hidden by {_place(files[0], option)}, which Hydra finds first; "
                f"give it another name and choose that with {chosen_by}"
            )


def _content(source: ConfigSource, option: str) -> tuple[Any, ...]:
    loaded = source.load_config(option)
    return loaded.config, loaded.header


def _place(source: ConfigSource, option: str) -> str:
    return (
        f"{source.path}/{option.removesuffix('.yaml')}.yaml"
        if source.scheme() == "file"
        else f"{source.scheme()}://{source.path}/{option}"
    )
