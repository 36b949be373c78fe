"""Sources whose rows are conversations: their options, and from files to samples. This file imports no torch.

The samples are made once, with the statistics, into an entry of the cache: train-0, train-1, ... of the paths to train
on and eval-0, ... of those to evaluate on, each a Store.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bridge.data import blend
from bridge.data.encode.conversation import ROLES, Names
from bridge.data.encode.encoded import Encoded
from bridge.data.encode.masks import Counts, Rules
from bridge.data.encode.templates import InvalidRow, Template
from bridge.data.readers import files, reader
from bridge.data.readers.reader import Row
from bridge.data.samples import shared
from bridge.data.samples.shared import SamplesConfig
from bridge.data.source import Datasets, Prepared, at_least, completed, digest
from bridge.data.split import check_split
from bridge.errors import ConfigError, shown
from bridge.weights.hf_assets import CHAT_TEMPLATE, GENERATION, copy_tokenizer

FORMAT = 2  # part of the cache key: raise it when the stored samples change their meaning
MANIFEST = "manifest.json"
INTERVAL = 10.0  # seconds between two lines on how far it is


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


Encode = Callable[[Row, Template, Counts], list[Encoded]]


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
                raise _refusal(row, place.key, error) from error


def _refusal(row: Row, key: str, error: InvalidRow) -> ConfigError:
    return ConfigError(f"{key}: {row.where}: {error}; mend or remove it, or set data.invalid=drop")


def prepare(config: Options, *, encode: Encode, cache: Path, needs_template: bool, extra: Any = None) -> Prepared:
    """The encoded samples below `cache`, made at first use; prints the line of statistics."""
    assert config.tokenizer is not None
    directory = Path(config.tokenizer).expanduser().absolute()
    entry = cache / f"{config.source.rpartition('.')[2]}-{_key(config, directory, extra)}"

    def fill(unfinished: Path) -> None:
        from bridge.data.encode import templates

        template = templates.load(
            directory, file=config.template, arguments=config.template_arguments, needed=needs_template
        )
        (unfinished / "tokenizer").mkdir()
        copy_tokenizer(directory, unfinished / "tokenizer")
        if template.text is not None:
            (unfinished / "tokenizer" / CHAT_TEMPLATE).write_text(template.text)
        found = [_store(place, config, encode, template, unfinished) for place in places(config)]
        size = max(template.tokenizer.get_vocab().values()) + 1
        manifest = {"vocab_size": size, "lines": [statistics.line for statistics in found]}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    completed(entry, fill=fill)
    manifest = json.loads((entry / MANIFEST).read_text())
    print(f"data: {'; '.join(manifest['lines'])}", flush=True)
    return Prepared(entry, manifest["vocab_size"], entry / "tokenizer")


def _key(config: Options, directory: Path, extra: Any) -> str:
    settings = [
        *(config.columns, config.roles, config.train_on, config.roles_to_train, config.rewritten_history),
        *(config.too_long, config.invalid, config.sequence_length, config.template_arguments, extra),
    ]
    template = None if config.template is None else Path(config.template).expanduser().read_text()
    sets = [(place.folder, files.identity(place.path, key=place.key)) for place in places(config)]
    names = ("tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE, GENERATION)
    tokenizer = [file.read_text() if (file := directory / name).is_file() else None for name in names]
    return digest(FORMAT, settings, template, sets, tokenizer)


@dataclass
class Statistics:
    """What the line before the first step says of one set."""

    title: str
    too_long: str
    counts: Counts = field(default_factory=Counts)
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    over_long: int = 0
    lost: int = 0
    dropped: int = 0
    first_dropped: str = ""

    @property
    def line(self) -> str:
        share = f"{self.trained / max(1, self.tokens):.1%}"
        said = [
            f"{self.title}: {self.samples:,} samples of {self.rows:,} rows, {self.tokens:,} tokens, {share} trained",
        ]
        if self.over_long:
            lost = f", {self.lost:,} of them left out" if self.lost else ""
            said.append(f"{self.over_long:,} over-long ({self.too_long}{lost})")
        if self.dropped:
            said.append(f"{self.dropped:,} invalid rows dropped (first {self.first_dropped})")
        if self.counts.rewritten:
            said.append(f"the template rewrites the history of {self.counts.rewritten:,} rows")
        if self.counts.unasked:
            said.append(f"{self.counts.unasked:,} opening answers not trained, as no prompt asks for them")
        if self.counts.endless:
            said.append(f"{self.counts.endless:,} answers without an end-of-turn token")
        if self.counts.dates:
            dates = " and ".join(sorted(self.counts.dates))
            said.append(f"the template put in the date of that day, {dates} (data.template_arguments can fix it)")
        return ", ".join(said)


def _store(place: Place, config: Options, encode: Encode, template: Template, entry: Path) -> Statistics:
    from bridge.data.samples import store

    folder = entry / place.folder
    folder.mkdir()
    title = blend.title(place.path)
    statistics = Statistics(title if place.key == "data.path" else f"{place.key} {title}", config.too_long)
    store.write(folder, samples(place, config, encode, template, statistics))
    if not statistics.samples:
        raise ConfigError(f"{place.key}: {title} gives no sample ({statistics.line}); set files that have some")
    return statistics


def samples(
    place: Place, config: Options, encode: Encode, template: Template, statistics: Statistics
) -> Iterator[Encoded]:
    """The samples of one set, as long as they may be; counts them. Raises ConfigError with file and line."""
    from bridge.data.encode import chat

    told = time.monotonic()
    for row in reader.rows(place.path, key=place.key):
        statistics.rows += 1
        try:
            found = encode(row, template, statistics.counts)
            for sample in found:
                chat.check(sample, everything=config.train_on == "all")
        except InvalidRow as error:
            if config.invalid == "error":
                raise _refusal(row, place.key, error) from error
            statistics.dropped += 1
            statistics.first_dropped = statistics.first_dropped or f"{row.where}: {error}"
            continue
        for sample in found:
            yield from _counted(sample, config, statistics)
        if time.monotonic() - told >= INTERVAL:
            told = time.monotonic()
            print(f"data: encoded {statistics.rows:,} rows, {statistics.tokens:,} tokens", flush=True)


def _counted(sample: Encoded, config: Options, statistics: Statistics) -> Iterator[Encoded]:
    from bridge.data.encode import chat

    positions = len(sample.tokens) - 1
    if positions > config.sequence_length:
        statistics.over_long += 1
        if config.too_long == "error":
            raise ConfigError(
                f"data.too_long: {sample.file}:{sample.line} has {positions + 1:,} tokens, more than "
                f"data.sequence_length={config.sequence_length} and one; set data.sequence_length={positions} or more, "
                "or data.too_long=truncate, drop or split"
            )
    pieces = list(chat.fitted(sample, sequence_length=config.sequence_length, policy=config.too_long))
    statistics.lost += not pieces
    for piece in pieces:
        statistics.samples += 1
        statistics.tokens += len(piece.tokens)
        statistics.trained += sum(weight > 0 for weight in piece.weights[1:])
        yield piece


def build(config: Options, prepared: Prepared, *, seed: int) -> Datasets:
    """Training and validation samples, in rows of their own or as `config` says. `seed`: of packing alone."""
    import numpy

    from bridge.data.samples.store import Store

    assert prepared.directory is not None and config.path is not None
    entry = prepared.directory

    def rows(stored: Store, chosen: Any = None) -> Any:
        ids = numpy.arange(len(stored)) if chosen is None else numpy.flatnonzero(chosen)
        return shared.dataset(config, stored, ids, seed=seed)

    weighted = blend.weighted(config.path)
    stores = [Store(entry / f"train-{number}") for number in range(len(weighted))]
    names = blend.evaluated(config.eval)
    if names:
        parts = [rows(stored) for stored in stores]
        valid = blend.valid({name: rows(Store(entry / f"eval-{number}")) for number, name in enumerate(names)})
    else:
        split = config.split or "95,5"
        parts, held = [], []
        for stored in stores:
            training, validation = held_out(stored.rows, split)
            parts.append(rows(stored, training))
            held += [rows(stored, validation)] if validation.any() else []
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
