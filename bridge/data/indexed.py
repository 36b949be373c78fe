"""Corpora that are tokenised already: megatron-core's .bin and .idx files."""

import glob
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.data import blend
from bridge.data.samples import bin_idx, texts
from bridge.data.source import Prepared, SourceConfig, completed, digest
from bridge.data.split import check_split
from bridge.errors import ConfigError

LARGEST = "largest.json"  # in a cache entry: the largest id of a corpus


@dataclass(frozen=True)
class Config(SourceConfig):
    """path: a prefix, a list of them, or {prefix: weight}. eval: a prefix or list of them, or {name: prefix}."""

    source: str = "indexed"
    path: str | list[str] | dict[str, float] | None = None
    eval: str | list[str] | dict[str, Any] | None = None
    split: str = "95,5"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.path is None:
            raise ConfigError("data.path: is not set; set the path of a .bin and .idx without suffix")


def check(config: Config) -> None:
    """Raises ConfigError when a file is missing, is no index or is cut off, or the tokenizer is none."""
    for prefix in _training(config):
        bin_idx.read_index(prefix)
    for name, prefixes in _evaluation(config).items():
        for prefix in prefixes:
            bin_idx.read_index(prefix, key=blend.eval_key(name))
    texts.check_tokenizer(config.tokenizer)


def prepare(config: Config, *, cache: Path, seed: int) -> Prepared:
    """The corpora's samples. Every token is read once, to know the largest id; the cache keeps it."""
    from bridge.data.samples import concatenated

    check(config)
    training, evaluation = _training(config), _evaluation(config)
    prefixes = dict.fromkeys([*training, *(prefix for found in evaluation.values() for prefix in found)])
    largest = {prefix: _largest_id(prefix, cache=cache) for prefix in prefixes}
    tokenizer = None if config.tokenizer is None else Path(config.tokenizer).expanduser()
    if tokenizer is not None:
        _check_ids(largest, tokenizer)
    mixture = concatenated.Mixture(training, evaluation, config.split, max(largest.values()) + 1)
    return concatenated.prepare(
        "indexed",
        mixture,
        tokenizer=tokenizer,
        cache=cache,
        sequence_length=config.sequence_length,
        seed=seed,
    )


build = texts.build


def _training(config: Config) -> dict[str, float | None]:
    """Prefixes and their weights; None: each is read once."""
    assert config.path is not None
    found: dict[str, float | None] = {}
    for path, weight in blend.weighted(config.path):
        prefixes = _prefixes(path, key="data.path")
        weighted = isinstance(config.path, dict)
        if weighted and len(prefixes) > 1:
            raise ConfigError(f"data.path: {path} are {len(prefixes)} corpora with one weight; give each its own")
        found |= dict.fromkeys(prefixes, weight if weighted else None)
    return found


def _evaluation(config: Config) -> dict[str, list[str]]:
    sets = blend.evaluated(config.eval)
    return {name: _prefixes(path, key=blend.eval_key(name)) for name, path in sets.items()}


def _prefixes(path: blend.Path, *, key: str) -> list[str]:
    return [prefix for item in ([path] if isinstance(path, str) else path) for prefix in _named(item, key=key)]


def _named(path: str, *, key: str) -> Iterable[str]:
    """The prefixes that a prefix, a folder or a pattern names; either suffix may be there."""
    name = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(name):
        name = os.path.join(glob.escape(name), "**", "*.idx")
    elif not glob.has_magic(name):
        return [name.removesuffix(".idx").removesuffix(".bin")]
    elif not name.endswith(".idx"):
        name = f"{name.removesuffix('.bin')}.idx"
    found = sorted(match.removesuffix(".idx") for match in glob.glob(name, recursive=True))
    if not found:
        raise ConfigError(f"{key}: {path} holds no .idx file; set the path of a .bin and .idx without suffix")
    return found


def _largest_id(prefix: str, *, cache: Path) -> int:
    def fill(directory: Path) -> None:
        found = bin_idx.largest_id(prefix, bin_idx.read_index(prefix))
        (directory / LARGEST).write_text(json.dumps(found))

    entry = completed(cache / f"ids-{digest(bin_idx.identity(prefix))}", fill=fill)
    return int(json.loads((entry / LARGEST).read_text()))


def _check_ids(largest: dict[str, int], directory: Path) -> None:
    from bridge.data.encode import tokenizer

    known = tokenizer.load(directory).vocab_size
    for prefix, found in largest.items():
        if found >= known:
            raise ConfigError(
                f"data.path: {prefix} has the token id {found}, but the tokenizer in {directory} has {known} ids; set "
                "data.tokenizer to the one that made it"
            )
