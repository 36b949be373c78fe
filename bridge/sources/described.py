"""Which model a Megatron checkpoint holds: its model.yaml says so, or the user does, and its tensors must agree."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bridge.config.architecture import NOT_ARCHITECTURE
from bridge.config.complete import complete
from bridge.errors import ConfigError, shown
from bridge.models import family
from bridge.models.hf import config as hf_config
from bridge.sources import told
from bridge.weights import locate
from bridge.weights.common_state import COMMON, megatron_args
from bridge.weights.dist_files import DistFiles, open_dist
from bridge.weights.key_layouts import canonical
from bridge.weights.locate import CheckpointPath

# What the tensors show beyond doubt, so that a section which says otherwise is wrong.
SHOWN = ("num_layers", "hidden_size", "share_embeddings_and_output_weights", "num_moe_experts")
# Megatron-LM's argument may differ without another model: a longer context does not change the weights.
FREE = frozenset({"max_sequence_length"})
ASK = (
    "set model=NAME of conf/model, model=FILE.yaml, single keys as model.KEY=VALUE, or reference=DIR, a Hugging Face "
    "directory of the same model"
)


class Described(NamedTuple):
    """`source` is what messages call the place `section` comes from. `assets`: Hugging Face files for the export."""

    section: dict[str, Any]
    source: str
    assets: Path


def model_of(
    found: CheckpointPath,
    *,
    model: Mapping[str, Any] | None = None,
    reference: str | Path | None = None,
    key: str = "megatron",
    ask: str = ASK,
) -> Described:
    """The model in a checkpoint: from its model.yaml, else from a `model` section or a Hugging Face directory.

    A section may leave out what the tensors, or Megatron-LM's arguments beside them, tell. Raises ConfigError when
    neither is given, listing the facts that are missing and ending in `ask`; when a model.yaml or both are there; and,
    naming the fact, when the checkpoint contradicts one.
    """
    own = found.root / locate.MODEL_YAML
    if own.is_file():
        for name, value in (("model", model), ("reference", reference)):
            if value is not None:
                raise ConfigError(f"{name}: {own} already determines the model; remove {name}=")
        return Described(locate.read_model_section(found.root), locate.MODEL_YAML, found.root / locate.HF_ASSETS)
    if model is not None and reference is not None:
        raise ConfigError("reference: determines the model, and so does model; set only one of the two")
    dist = open_dist(found.directory)
    if reference is not None:
        reference = Path(reference).expanduser()
        if not locate.is_hf(reference):
            raise ConfigError(f"reference: {reference} has no config.json; give a Hugging Face directory")
        config = hf_config.read(reference)
        section = hf_config.to_mcore(config)
        hf_config.tell_unread(config)
        check(section, dist, source="reference")
        return Described(section, "reference", reference)
    facts, args = _own_facts(dist)
    section = _filled(model or {}, facts.model | args)
    missing = [name for name in told.untold(section) if model is None or name not in told.MAY_BE_DEFAULT]
    if missing:
        none = f"{key}: {found.directory} has no model.yaml, and nothing in it tells its"
        subject = none if model is None else "model: lacks"
        known = [f"{name}={shown(value)}" for name, value in (facts.model | args).items()]
        raise ConfigError(f"{subject} {', '.join(missing)} (known: {', '.join([*known, *facts.hints])}); {ask}")
    check(section, dist, source="model")
    return Described(section, "model", found.root / locate.HF_ASSETS)


def check(section: Mapping[str, Any], dist: DistFiles, *, source: str) -> None:
    """Raise ConfigError, naming the first fact in which `section` and what a checkpoint says of itself differ.

    `source` is what the message calls the place the section comes from. Shapes that follow from several facts are for
    `ledger.check_megatron`.
    """
    facts, args = _own_facts(dist)
    full = complete(section)
    wrong = {name: full.get(name) for name in SHOWN if full.get(name) != facts.model.get(name)}
    for name, value in wrong.items():
        theirs, evidence = facts.model.get(name), facts.evidence.get(name, "no tensor of that kind")
        raise ConfigError(
            f"{source}: {name} is {shown(value)}, but {dist.directory} has {shown(theirs)} ({evidence}); "
            "describe the model it holds"
        )
    trained = complete({**full, **args})
    for name in sorted(args.keys() - NOT_ARCHITECTURE - FREE):
        if full[name] != trained[name]:
            raise ConfigError(
                f"{source}: {name} is {shown(full[name])}, but Megatron-LM trained {dist.directory} with "
                f"{shown(trained[name])} ({COMMON}); describe the model it holds"
            )


def _own_facts(dist: DistFiles) -> tuple[told.Facts, dict[str, Any]]:
    return told.of_tensors(canonical(dist)), told.of_args(megatron_args(dist.directory))


def _filled(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, and below it those `known` facts that its family has a word for."""
    section = {name: value for name, value in given.items() if value is not None}
    if "family" not in section:
        return dict(known) | section
    its_family = family.by_name(section["family"])
    words = its_family.constants.keys() | {name for part in its_family.parts for name in part.model_keys}
    own = {name: value for name, value in known.items() if name in words}
    return {"family": section["family"], **its_family.constants, **own, **section}
