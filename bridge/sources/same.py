"""Whether two `model` sections describe one model, as far as weights are concerned. Costs no torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bridge.config.architecture import NOT_ARCHITECTURE
from bridge.config.complete import complete

# Model keys that may differ between a checkpoint and the run that starts from it, beside those of no architecture.
FREE = frozenset({"attention_dropout", "init_method_std", "max_sequence_length"})


class Difference(NamedTuple):
    """A key, and what the two sections make of it."""

    name: str
    theirs: Any
    ours: Any


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """Where two `model` sections, complete or not, do not describe one model."""
    theirs, ours = complete(theirs), complete(ours)
    free = NOT_ARCHITECTURE | (FREE - {"max_sequence_length"} if ours["rope_parameters"] else FREE)
    names = [name for name in theirs | ours if name == "family" or name not in free]
    return [Difference(name, theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)]
