"""Builds a closed section: every key is a field of its dataclass, every value has the field's type and range."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from bridge.config import annotation, durations, other_names
from bridge.errors import ConfigError, did_you_mean, shown

Section = TypeVar("Section")


def unknown_key(key: str, value: Any, names: Any) -> ConfigError:
    """The error for a key that is none of `names`. `key` is the full key."""
    names = list(names)
    meant = other_names.instead(key, value) or did_you_mean(key.rpartition(".")[2], names) or _listed(names)
    return ConfigError(f"{key}: unknown key (value {shown(value)}){meant}")


def build(kind: type[Section], values: Any, path: str) -> Section:
    """An instance of dataclass `kind` from `values`. Raises ConfigError with the full key.

    `path` is where the section sits; empty: the top level. A field may carry metadata `min`, its smallest legal value
    (of a list: of each item), or `duration`, for a text such as 90s.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: {shown(values)} is not a section; set its keys one by one, e.g. {path}.KEY=VALUE")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        if name not in fields:
            raise unknown_key(key, value, fields)
        arguments[name] = _value(fields[name], value, key)
    for name, field in fields.items():
        if (
            name not in arguments
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise ConfigError(f"{path}.{name}".lstrip(".") + ": is missing; set it")
    return kind(**arguments)


def _value(field: "dataclasses.Field[Any]", value: Any, key: str) -> Any:
    if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
        return build(field.type, value, key)
    if field.metadata.get("duration") and value is not None:
        durations.check(key, value)
        return value
    annotation.check(key, value, annotation.of_dataclass_field(field.type))
    smallest = field.metadata.get("min")
    for item in value if isinstance(value, list) else [value]:
        if smallest is not None and isinstance(item, int | float) and item < smallest:
            raise ConfigError(f"{key}: {shown(item)} is too small; set {smallest} or more")
    return value


def _listed(names: Any) -> str:
    return f"; known here: {', '.join(names)}" if names else "; nothing can be set here"
