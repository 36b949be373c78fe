"""Every key that a command line can set and the text of its type, from the declarations alone: for hints."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from bridge.config import mcore_fields, modules, routing
from bridge.config.annotation import of_dataclass_field
from bridge.config.run_config import RunConfig
from bridge.config.schema import ConvertConfig

# Section -> the package of modules that declare its keys.
_NAMED = {"data": "data", "objective": "objectives", "peft": "peft"}


@cache
def of_command(primary: str) -> Mapping[str, str]:
    """Full key -> annotation, of conf/<primary>.yaml: train or convert."""
    if primary == "convert":
        return dict(_declared(ConvertConfig))
    keys = dict(_declared(RunConfig))
    for section, package in _NAMED.items():
        for name in modules.known(package):
            for key, text in _declared(modules.options(modules.load(section, name, package)), f"{section}."):
                keys.setdefault(key, text)
    return keys | _of_megatron()


def _declared(kind: Any, path: str = "") -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(kind):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _declared(field.type, f"{path}{field.name}.")
        elif field.metadata.get("duration"):  # a number needs a unit, not quotes
            yield f"{path}{field.name}", "duration"
        elif "dict" not in of_dataclass_field(field.type):
            yield f"{path}{field.name}", of_dataclass_field(field.type)


def _of_megatron() -> dict[str, str]:
    keys = routing.own()
    for fields in mcore_fields.targets().values():
        for name, field in fields.items():
            if routing.settable(name, field):
                keys[routing.home(name)] = mcore_fields.checked_annotation(field)
    return keys


def is_text(annotation: str) -> bool:
    """Whether a key of this type takes any text."""
    return "str" in annotation.replace("[", " ").replace("]", " ").split() and "list" not in annotation.lower()


def with_last_part(key: str, keys: Mapping[str, str]) -> list[str]:
    """Those of `keys` that end as `key` does, from its first dot on or with its last part."""
    whole = [known for known in keys if known.endswith(f".{key}")]
    return whole or [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
