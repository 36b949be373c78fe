"""What a model family is, and how one is found: by file name, dotted module name, or Hugging Face model_type."""

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from bridge.config.complete import complete
from bridge.errors import ConfigError, ConversionError, did_you_mean, shown
from bridge.models import families
from bridge.models.hf.fields import Part
from bridge.weights.table import Table


@dataclass(frozen=True)
class Family:
    """Architecture facts of one Hugging Face model class, as data."""

    architecture: str  # the Hugging Face class, as `architectures` in config.json names it
    model_type: str
    hf_defaults: Mapping[str, Any]  # what transformers takes for a field config.json does not have
    parts: tuple[Part, ...]  # the fields that shape the model
    constants: Mapping[str, Any]  # model keys with one value for every model of the family
    rows: Callable[[Mapping[str, Any]], Table] = field(repr=False)  # complete model keys -> weight table
    # The model_type whose class in transformers computes this model, where transformers does not know its own.
    class_of: str = ""
    aliases: tuple[str, ...] = ()  # other names of the same class in files, older ones that shipped their own code
    # The config fields of a directory, given its tensors' names, where files may lack parts that their config counts.
    stored: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, Any]] | None = field(repr=False, default=None)
    # Further ways in which files name or stack the same tensors, such as all experts in one tensor.
    spellings: Mapping[str, Callable[[Mapping[str, Any]], Table]] = field(repr=False, default_factory=dict)

    def table(self, model: Mapping[str, Any], *, spelling: str = "") -> Table:
        """The weight table of a model with these `model` keys (absent ones have megatron-core's defaults)."""
        return (self.spellings[spelling] if spelling else self.rows)(complete(model))

    def spelling(self, model: Mapping[str, Any], hf_names: Collection[str]) -> str:
        """The spelling that knows all of these Hugging Face tensors; "", the usual one, when none does."""
        for spelling in ("", *self.spellings):
            table = self.table(model, spelling=spelling)
            if all(map(table.knows, hf_names)):
                return spelling
        return ""


@cache
def by_name(name: str) -> Family:
    """The family called `name` in YAML: a file in bridge/models/families, or a dotted module that has FAMILY.

    Raises ConfigError when there is none.
    """
    module = name if "." in name else f"{families.__name__}.{name}"
    known = known_names()
    if "." not in name and name not in known:
        raise ConfigError(f"model.family: {shown(name)} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    try:
        family = getattr(importlib.import_module(module), "FAMILY", None)
    except ImportError as error:
        raise ConfigError(f"model.family: {name!r} cannot be imported: {error}; install it") from error
    if not isinstance(family, Family):
        raise ConfigError(f"model.family: module {module} has no FAMILY of type bridge.models.family.Family")
    return family


def name_of_hf_config(hf: Mapping[str, Any]) -> str:
    """The family name for a Hugging Face config. Raises ConversionError when no family has its model_type."""
    kind = hf.get("model_type")
    types = _model_types()
    if kind not in types:
        hint = did_you_mean(str(kind), types)
        raise ConversionError(
            f"config.json: model_type: {shown(kind)} is not supported; known are "
            f"{', '.join(types)}{hint or '; set family'}"
        )
    return types[kind]


@cache
def _model_types() -> dict[str, str]:
    return {by_name(name).model_type: name for name in known_names()}


@cache
def known_names() -> tuple[str, ...]:
    """Names of the families in bridge/models/families."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(families.__path__)))
