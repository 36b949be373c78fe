"""Sources whose rows are conversations: their options, and from files to samples. This file imports no torch.

The samples are made once, with the statistics, into an entry of the cache: train-0, train-1, ... of the paths to train
on and eval-0, ... of those to evaluate on, each a Store.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bridge.data import blend
from bridge.data.encode import rows, sharding
from bridge.data.encode.conversation import ROLES, Names
from bridge.data.encode.masks import Rules
from bridge.data.encode.templates import InvalidRow, Template
from bridge.data.readers import files, reader
from bridge.data.samples import shared
from bridge.data.samples.shared import SamplesConfig
from bridge.data.source import Datasets, Prepared, at_least, completed, digest
from bridge.data.split import check_split
from bridge.errors import ConfigError, shown
from bridge.weights.hf_assets import CHAT_TEMPLATE, GENERATION, copy_tokenizer

FORMAT = 3  # part of the cache key: raise it when the stored samples change their meaning
MANIFEST = "manifest.json"
WORTH = 1 << 22  # bytes of rows that a process of their own is worth: its start costs as much as encoding two thirds


@dataclass(frozen=True)
class Options(SamplesConfig):
    """What all sources of conversations are told."""

    sequence_length: int = at_least(1, 2048)
    path: str | list[str] | dict[str, float] | None = None
    eval: str | list[str] | dict[str, Any] | None = None
    split: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    train_on: Literal["assistant", "last", "all"] = "assistant"
    roles_to_train: list[str] = field(default_factory=lambda: ["assistant"])
    rewritten_history: Literal["split", "last", "error"] = "split"
    too_long: Literal["error", "truncate", "drop", "split"] = "error"
    invalid: Literal["error", "drop"] = "error"
    num_processes: int | None = at_least(1, None)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise ConfigError("data.path: is not set; set the file, folder or pattern of the rows to train on")
        if self.split is not None:
            check_split(self.split)
            if self.eval is not None:
                raise ConfigError(
                    f"data.split: {shown(self.split)} is set, and so is data.eval={shown(self.eval)}; set only one"
                )

    @property
    def names(self) -> Names:
        return Names(self.columns, self.roles)

    @property
    def rules(self) -> Rules:
        return Rules(self.train_on, tuple(self.roles_to_train), self.rewritten_history)


class Place(NamedTuple):
    """One set of files. folder: its store's name in the cache entry."""

    key: str
    path: blend.Path
    folder: str


def places(config: Options) -> list[Place]:
    """The sets to train on, then those to evaluate on."""
    assert config.path is not None
    train = [Place("data.path", path, f"train-{n}") for n, (path, _) in enumerate(blend.weighted(config.path))]
    evals = enumerate(blend.evaluated(config.eval).items())
    return train + [Place(blend.eval_key(name), path, f"eval-{n}") for n, (name, path) in evals]


def check(config: Options, talk_of: Callable[[Any], object], known: list[str]) -> None:
    """Raises ConfigError for a path without rows, a first row that is malformed, or a template that is missing."""
    for name in config.columns:
        if name not in known:
            raise ConfigError(f"data.columns: {name} is no column of data={config.source}; known: {', '.join(known)}")
    roles = {*ROLES.values(), *config.roles.values()}
    for role in config.roles_to_train:
        if role not in roles:
            raise ConfigError(f"data.roles_to_train: {role} is no role of the rows; known: {', '.join(sorted(roles))}")
    if config.template is not None and not Path(config.template).expanduser().is_file():
        raise ConfigError(f"data.template: {config.template} is no file; set one that holds a Jinja chat template")
    if config.tokenizer is None:
        raise ConfigError(
            "data.tokenizer: is not set, and no init.path brings one; set either to the model's directory"
        )
    for place in places(config):
        row = reader.check(place.path, key=place.key)
        if config.invalid == "error":
            try:
                talk_of(row.value)
            except InvalidRow as error:
                raise rows.refusal(row, place.key, error) from error


def prepare(config: Options, *, encode: rows.Encode, cache: Path, needs_template: bool, extra: Any = None) -> Prepared:
    """The encoded samples below `cache`, made at first use; prints the line of statistics.

    encode: what a module has at its top, as other processes get it.
    """
    entry = cache / f"{config.source.rpartition('.')[2]}-{_key(config, extra)}"
    completed(entry, fill=_Sets(config, encode, needs_template), resumable=True)
    manifest = json.loads((entry / MANIFEST).read_text())
    print(f"data: {'; '.join(manifest['lines'])}", flush=True)
    return Prepared(entry, manifest["vocab_size"], entry / "tokenizer")


def _tokenizer(config: Options) -> Path:
    assert config.tokenizer is not None
    return Path(config.tokenizer).expanduser().absolute()


def _key(config: Options, extra: Any) -> str:
    directory = _tokenizer(config)
    settings = [
        *(config.columns, config.roles, config.train_on, config.roles_to_train, config.rewritten_history),
        *(config.too_long, config.invalid, config.sequence_length, config.template_arguments, extra),
    ]
    template = None if config.template is None else Path(config.template).expanduser().read_text()
    sets = [(place.folder, files.identity(place.path, key=place.key)) for place in places(config)]
    names = ("tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE, GENERATION)
    tokenizer = [file.read_text() if (file := directory / name).is_file() else None for name in names]
    return digest(FORMAT, settings, template, sets, tokenizer)


@dataclass(frozen=True)
class _Sets:
    """Encodes the sets into an entry of the cache: shards of each, which survive a kill, and then a store of them."""

    config: Options
    encode: rows.Encode
    needs_template: bool

    def __call__(self, entry: Path) -> None:
        """Write the entry. Raises ConfigError."""
        config = self.config
        template = self._job("data.path").template()
        (entry / "tokenizer").mkdir(exist_ok=True)
        copy_tokenizer(_tokenizer(config), entry / "tokenizer")
        if template.text is not None:
            (entry / "tokenizer" / CHAT_TEMPLATE).write_text(template.text)
        lines = [self._set(place, template, entry) for place in places(config)]
        size = max(template.tokenizer.get_vocab().values()) + 1
        (entry / MANIFEST).write_text(json.dumps({"vocab_size": size, "lines": lines}, indent=2) + "\n")
        for place in places(config):
            shutil.rmtree(entry / f"{place.folder}-shards")

    def _job(self, key: str) -> rows.EncodeRows:
        return rows.EncodeRows(self.config, self.encode, key, self.needs_template)

    def _set(self, place: Place, template: Template, entry: Path) -> str:
        """Its store; its line of statistics."""
        job, meter = self._job(place.key), files.Meter()
        shards, folder = entry / f"{place.folder}-shards", entry / place.folder
        shards.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        size = files.size(place.path, key=place.key)
        found = sharding.chunks(
            reader.rows(place.path, key=place.key, meter=meter),
            size=size,
            share_read=lambda: meter.share(size),
            characters=rows.characters,
        )
        number = sharding.num_processes(self.config.num_processes, size, worth=WORTH)
        here = partial(rows.write_shard, job=job, template=template)
        statistics = rows.merge(sharding.write(shards, found, job=job, here=here, num_processes=number), folder)
        title = blend.title(place.path)
        line = statistics.line(
            title if place.key == "data.path" else f"{place.key} {title}", too_long=self.config.too_long
        )
        if not statistics.samples:
            raise ConfigError(f"{place.key}: {title} gives no sample ({line}); set files that have some")
        return line


def build(config: Options, prepared: Prepared, *, seed: int) -> Datasets:
    """Training and validation samples, in rows of their own or as `config` says. `seed`: of packing alone."""
    import numpy

    from bridge.data.samples.store import Store

    assert prepared.directory is not None and config.path is not None
    entry = prepared.directory

    def in_rows(stored: Store, chosen: Any = None) -> Any:
        ids = numpy.arange(len(stored)) if chosen is None else numpy.flatnonzero(chosen)
        return shared.dataset(config, stored, ids, seed=seed)

    weighted = blend.weighted(config.path)
    stores = [Store(entry / f"train-{number}") for number in range(len(weighted))]
    names = blend.evaluated(config.eval)
    if names:
        parts = [in_rows(stored) for stored in stores]
        valid = blend.valid({name: in_rows(Store(entry / f"eval-{number}")) for number, name in enumerate(names)})
    else:
        split = config.split or "95,5"
        parts, held = [], []
        for stored in stores:
            training, validation = held_out(stored.rows, split)
            parts.append(in_rows(stored, training))
            held += [in_rows(stored, validation)] if validation.any() else []
        valid = None if not held else held[0] if len(held) == 1 else blend.Blend(held, [len(part) for part in held])
    if any(len(part) == 0 for part in parts):
        raise ConfigError(f"data.split: {shown(config.split)} leaves no row to train on; set e.g. '95,5'")
    train = parts[0] if len(parts) == 1 else blend.Blend(parts, [weight for _, weight in weighted])
    return Datasets(train, valid)


def held_out(rows: Any, split: str) -> tuple[Any, Any]:
    """Which of the samples of these rows are for training, and which for validation, bool [samples] each.

    Whole rows, evenly over the file, as near to the shares as can be: every twentieth of "95,5". A third share is of
    rows that are not used.
    """
    import numpy

    shares = [float(part) for part in split.split(",")] + [0.0, 0.0]
    total = sum(shares[:3])
    after = numpy.floor((rows + 1) * (shares[1] / total) + 1e-9)
    validation = after > numpy.floor(rows * (shares[1] / total) + 1e-9)
    others = (shares[1] + shares[2]) / total
    not_training = numpy.floor((rows + 1) * others + 1e-9) > numpy.floor(rows * others + 1e-9)
    return ~(validation | not_training), validation
