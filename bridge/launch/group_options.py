"""`--help` without copying all that Hydra 1.3 knows for each of the 90 questions it asks about groups and options."""

import functools
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType


@functools.cache
def share_repository() -> None:
    """Let ConfigLoaderImpl answer from its own repository: 0.3 instead of 0.7 s of CPU time for --help.

    Hydra copies it, 5 ms each time, because a configuration may name other search paths; here none is read.
    """
    copying = ConfigLoaderImpl.get_group_options

    def get_group_options(
        self: ConfigLoaderImpl,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        if config_name is not None or overrides:
            return copying(self, group_name, results_filter, config_name, overrides)
        return self.repository.get_group_options(group_name, results_filter)

    loader: Any = ConfigLoaderImpl
    loader.get_group_options = get_group_options
