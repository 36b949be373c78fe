"""Weights for a live model from a Hugging Face directory or a Megatron checkpoint, straight into the shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bridge import parallel
from bridge.config.routing import Routed
from bridge.models import family
from bridge.models.hf import config as hf_config
from bridge.sources.described import check, model_of
from bridge.sources.same import check_same_model, model_section
from bridge.weights import into_model, locate
from bridge.weights.dist_files import open_dist
from bridge.weights.hf_files import main_dtype
from bridge.weights.ledger import OPTIMIZER_PREFIXES
from bridge.weights.quantized import open_source
from bridge.weights.transfer import specs_of


def load_initial(model: Sequence[torch.nn.Module], path: str | Path, routed: Routed, *, key: str = "init.path") -> None:
    """Fill `model` (this rank's chunks, built from `routed`) with the weights in `path`.

    `path`: a Hugging Face directory, a run, its checkpoints or one iteration. Raises ConfigError naming `key` when it
    is neither, or naming the `model` keys that differ; ConversionError when tensors are missing, left over or damaged.
    """
    path = Path(path).expanduser().absolute()
    section = same_section(path, routed, key=key)
    its_family = family.by_name(routed.family)
    vocab_size = routed.gpt["vocab_size"]
    if locate.is_megatron(path):
        dist = open_dist(locate.locate(path, key=key).directory)
        into_model.load_megatron(model, dist, table=its_family.table(section), vocab_size=vocab_size)
    else:
        hf = open_source(path)
        table = its_family.table(section, spelling=its_family.spelling(section, hf.tensors))
        into_model.load_hf(model, hf, table=table, vocab_size=vocab_size)


def same_section(path: Path, routed: Routed, *, key: str) -> dict[str, Any]:
    """The `model` section of a directory, found to be that of `routed`; where it has none, `routed`'s own, which its
    tensors must bear out. Raises ConfigError naming `key`, or the `model` keys that differ."""
    if path.is_dir() and locate.is_megatron(path):
        found = locate.locate(path, key=key)
        if not (found.root / locate.MODEL_YAML).is_file():
            ours = model_section(routed)
            check(ours, open_dist(found.directory), source="model")
            if parallel.is_main():
                print(
                    f"{key}: {found.directory} has no model.yaml; its model is taken to be this run's `model`",
                    flush=True,
                )
            return ours
    section = read_section(path, key=key)
    check_same_model(section, routed, path=path)
    return section


def read_section(path: Path, *, key: str) -> dict[str, Any]:
    """The `model` section of a model directory of either kind. Raises ConfigError naming `key`, ConversionError."""
    locate.check_model(path, key=key)
    if locate.is_megatron(path):
        found = locate.locate(path, key=key)
        return model_of(found, key=key, ask=f"write its `model` section to {found.root / locate.MODEL_YAML}").section
    config = hf_config.read(path)
    section = hf_config.to_mcore(config)
    hf_config.tell_unread(config)
    return section


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype most bytes of the weights in a model directory of either kind have."""
    if locate.is_megatron(path):
        dist = open_dist(locate.locate(path).directory)
        return main_dtype(spec for key, spec in specs_of(dist).items() if not key.startswith(OPTIMIZER_PREFIXES))
    return main_dtype(specs_of(open_source(path)).values())
