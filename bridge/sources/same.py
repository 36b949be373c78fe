"""Whether two `model` sections describe one model, as far as weights are concerned. Costs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bridge.config.architecture import NOT_ARCHITECTURE
from bridge.config.complete import complete
from bridge.config.routing import Routed
from bridge.errors import ConfigError, shown
from bridge.weights import locate

# Model keys that may differ between a checkpoint and the run that starts from it, beside those of no architecture.
FREE = frozenset({"attention_dropout", "init_method_std", "max_sequence_length"})


class Difference(NamedTuple):
    """A key, and what the two sections make of it."""

    name: str
    theirs: Any
    ours: Any


def told_section(path: Path, *, key: str, family: str | None = None) -> dict[str, Any] | None:
    """The `model` section that a model directory of either kind tells by its files; None for a Megatron checkpoint
    without model.yaml, of which the tensors tell (`described`). family: of Hugging Face files, unless it is found.

    Raises ConfigError naming `key`, ConversionError.
    """
    locate.check_model(path, key=key)
    if not locate.is_megatron(path):
        from bridge.models.hf import config as hf_config  # with all families: a start without weights needs none

        return hf_config.to_mcore(hf_config.read(path), family=family)
    root = locate.locate(path, key=key).root
    return locate.read_model_section(root) if (root / locate.MODEL_YAML).is_file() else None


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """Where two `model` sections, complete or not, do not describe one model."""
    theirs, ours = complete(theirs), complete(ours)
    free = NOT_ARCHITECTURE | (FREE - {"max_sequence_length"} if ours["rope_parameters"] else FREE)
    names = [name for name in theirs | ours if name == "family" or name not in free]
    return [Difference(name, theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)]


def check_same_model(section: Mapping[str, Any], routed: Routed, *, path: Path) -> None:
    """Raise ConfigError naming every `model` key in which a run (`routed`) and the checkpoint's `section` differ."""
    different = [
        f"{routed.key(name)} is {shown(ours)} (there {shown(theirs)})"
        for name, theirs, ours in differences(section, model_section(routed))
    ]
    if different:
        raise ConfigError(
            f"{', '.join(different)}: not the model in {path}; use that directory's values (python convert.py "
            "mode=yaml hf=DIR prints them)"
        )


def model_section(routed: Routed) -> dict[str, Any]:
    """The `model` section that `routed` came from, without the keys that were left at megatron-core's default."""
    values = routed.transformer | routed.gpt
    names = [name for name, key in routed.origin.items() if key.startswith("model.") and name in values]
    return {"family": routed.family, **{name: values[name] for name in names}}
