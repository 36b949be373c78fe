"""Code a configuration names: data sources, objectives, adapters, model families. One file each, no registry.

`jsonl` means bridge/data/jsonl.py; a dotted name (`my_pkg.my_source`) means that module of an installed package.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bridge.config import sections
from bridge.errors import ConfigError, did_you_mean

DECLARED = ("class Config", "OBJECTIVE", "FAMILY")  # how the line begins that makes a file one of those
_BRIDGE = Path(__file__).resolve().parent.parent


@functools.cache
def known(package: str) -> tuple[str, ...]:
    """The modules in bridge/<package> that declare one of DECLARED at top level (read as text, not imported)."""
    files = sorted((_BRIDGE / package).glob("*.py"))
    return tuple(file.stem for file in files if any(map(_declares, file.read_text(encoding="utf-8").splitlines())))


def _declares(line: str) -> bool:
    return line.startswith(DECLARED)


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
    """Checks section `values` against the `options` of the module that `values[selector]` names.

    Raises ConfigError.
    """
    key = f"{section}.{selector}"
    if selector not in values:
        near = difflib.get_close_matches(selector, list(values), n=1)
        found = f"; found {section}.{near[0]}, did you mean '{selector}'?" if near else ""
        raise ConfigError(f"{key}: is missing; set one of {', '.join(known(package))}{found}")
    declared = options(load(key, values[selector], package))
    if declared is None:
        name = "OBJECTIVE" if package == "objectives" else "Config"
        raise ConfigError(
            f"{key}: module '{values[selector]}' has no dataclass named {name}; add one that lists its options"
        )
    try:
        sections.build(declared, values, section)
    except TypeError as error:  # a method is missing
        raise ConfigError(f"{key}: '{values[selector]}' is not complete ({error})") from error


def options(module: ModuleType) -> Any:
    """The dataclass with a field for each key of the section, the selector included: Config or, of an objective, the
    class that OBJECTIVE names. None when there is none."""
    found = getattr(module, "Config", None) or getattr(module, "OBJECTIVE", None)
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
