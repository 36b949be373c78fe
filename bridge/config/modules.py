"""Code a configuration names: data sources, adapters, model families. One file each, found by name, no registry.

`jsonl` means bridge/data/jsonl.py; a dotted name (`my_pkg.my_source`) means that module of an installed package.
"""

import dataclasses
import difflib
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bridge.config import sections
from bridge.errors import ConfigError, did_you_mean

_BRIDGE = Path(__file__).resolve().parent.parent


def known(package: str) -> list[str]:
    """The modules in bridge/<package> that declare `Config` or `FAMILY` at top level (read as text, not imported)."""
    files = sorted((_BRIDGE / package).glob("*.py"))
    return [
        file.stem
        for file in files
        if any(line.startswith(("class Config", "FAMILY")) for line in file.open(encoding="utf-8"))
    ]


def require(key: str, name: Any, package: str) -> None:
    """Raises ConfigError naming `key` unless `name` is a module of bridge/<package> or an importable dotted name."""
    names = known(package)
    if not isinstance(name, str):
        raise ConfigError(f"{key}: {name!r} is not a name; set one of {', '.join(names)} or a dotted module name")
    if name in names or ("." in name and _importable(name)):
        return
    hint = did_you_mean(name, names)
    raise ConfigError(
        f"{key}: '{name}' is not known; set one of {', '.join(names)} or an importable dotted module name{hint}"
    )


def load(key: str, name: str, package: str) -> ModuleType:
    """The module that `name` means; ConfigError when importing it fails."""
    require(key, name, package)
    full_name = name if "." in name else f"bridge.{package.replace('/', '.')}.{name}"
    try:
        return importlib.import_module(full_name)
    except ImportError as error:
        raise ConfigError(f"{key}: '{name}' cannot be imported ({error}); install what it needs") from error


def check_options(section: str, selector: str, values: Mapping[str, Any], *, package: str) -> None:
    """Checks section `values` against the `Config` dataclass of the module that `values[selector]` names.

    Raises ConfigError. `Config` has a field for each key, the selector included.
    """
    key = f"{section}.{selector}"
    if selector not in values:
        near = difflib.get_close_matches(selector, list(values), n=1)
        found = f"; found {section}.{near[0]}, did you mean '{selector}'?" if near else ""
        raise ConfigError(f"{key}: is missing; set one of {', '.join(known(package))}{found}")
    config = getattr(load(key, values[selector], package), "Config", None)
    if not isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise ConfigError(
            f"{key}: module '{values[selector]}' has no dataclass named Config; add one that lists its options"
        )
    sections.build(config, values, section)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
