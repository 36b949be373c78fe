"""Rows become a shard of samples, counted: a store, and what the line of statistics says of it."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bridge.data.encode import chat, templates
from bridge.data.encode.encoded import Encoded
from bridge.data.encode.masks import Counts
from bridge.data.encode.sharding import Made, Work
from bridge.data.encode.templates import InvalidRow, Template
from bridge.data.readers.reader import Row
from bridge.data.samples import store
from bridge.errors import ConfigError

STATISTICS = "statistics.json"  # in a shard

Encode = Callable[[Any, Row, Template, Counts], list[Encoded]]  # (the source's Config, ...); may raise InvalidRow


@dataclass
class Statistics:
    """What happened to the rows of one set, or of a part of it."""

    counts: Counts = field(default_factory=Counts)
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    over_long: int = 0
    lost: int = 0
    dropped: int = 0
    first_dropped: str = ""

    def line(self, title: str, *, too_long: str) -> str:
        """For people, before the first step."""
        share = f"{self.trained / max(1, self.tokens):.1%}"
        said = [f"{title}: {self.samples:,} samples of {self.rows:,} rows, {self.tokens:,} tokens, {share} trained"]
        if self.over_long:
            lost = f", {self.lost:,} of them left out" if self.lost else ""
            said.append(f"{self.over_long:,} over-long ({too_long}{lost})")
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

    def add(self, later: Mapping[str, Any]) -> None:
        """Those of the rows that come next, as `write_shard` left them."""
        for name in ("rows", "samples", "tokens", "trained", "over_long", "lost", "dropped"):
            setattr(self, name, getattr(self, name) + later[name])
        for name in ("rewritten", "unasked", "endless"):
            setattr(self.counts, name, getattr(self.counts, name) + later["counts"][name])
        self.counts.dates |= set(later["counts"]["dates"])
        self.first_dropped = self.first_dropped or later["first_dropped"]


@dataclass(frozen=True)
class EncodeRows:
    """The `sharding.Job`. config: of the source (`tuning.Options`). key: of the rows' path, for messages."""

    config: Any
    encode: Encode
    key: str
    needs_template: bool
    unit: str = "samples"

    def is_whole(self, prefix: str) -> bool:
        return store.is_whole(Path(prefix)) and _read(prefix) is not None

    def start(self) -> Work:
        _import_transformers()
        return partial(write_shard, job=self, template=self.template())

    def template(self) -> Template:
        """Raises ConfigError when there is none but `needs_template`."""
        config = self.config
        directory = Path(config.tokenizer).expanduser().absolute()
        return templates.load(
            directory, file=config.template, arguments=config.template_arguments, needed=self.needs_template
        )


def _import_transformers() -> None:
    """Without torch, unless that is there already: no tokenizer needs its 3 s and 240 MB. For this process for good."""
    if "torch" not in sys.modules and "transformers" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            import transformers  # noqa: F401
        finally:
            del sys.modules["torch"]


def write_shard(prefix: str, rows: Sequence[Row], *, job: EncodeRows, template: Template) -> Made:
    """The directory PREFIX with the samples of `rows`, which appears when it is whole. Raises ConfigError."""
    unfinished, statistics = Path(f"{prefix}.unfinished"), Statistics()
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    store.write(unfinished, _samples(rows, job, template, statistics))
    kept = asdict(statistics)
    kept["counts"]["dates"] = sorted(statistics.counts.dates)
    (unfinished / STATISTICS).write_text(json.dumps(kept))
    shutil.rmtree(prefix, ignore_errors=True)
    os.rename(unfinished, prefix)
    return Made(statistics.samples, statistics.tokens)


def merge(prefixes: Sequence[str], into: Path) -> Statistics:
    """One store of the shards, in their order, and their statistics together."""
    store.merge([Path(prefix) for prefix in prefixes], into)
    statistics = Statistics()
    for prefix in prefixes:
        found = _read(prefix)
        assert found is not None
        statistics.add(found)
    return statistics


def _read(prefix: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(Path(prefix, STATISTICS).read_text())
    except (OSError, ValueError):
        return None
    return found


def characters(row: Row) -> int:
    """About how long a row is: all texts in it, and one for whatever else it holds."""
    length, left = 0, [row.value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            length += len(value)
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list):
            left += value
        length += 1
    return length


def _samples(rows: Sequence[Row], job: EncodeRows, template: Template, statistics: Statistics) -> Iterator[Encoded]:
    """The samples of `rows` as they are stored. Raises ConfigError with file and line."""
    config = job.config
    for row in rows:
        statistics.rows += 1
        try:
            found = job.encode(config, row, template, statistics.counts)
            for sample in found:
                chat.check(sample, everything=config.train_on == "all")
        except InvalidRow as error:
            if config.invalid == "error":
                raise refusal(row, job.key, error) from error
            statistics.dropped += 1
            statistics.first_dropped = statistics.first_dropped or f"{row.where}: {error}"
            continue
        for sample in found:
            yield from _fitted(sample, config, statistics)


def refusal(row: Row, key: str, error: InvalidRow) -> ConfigError:
    """What is said of a row that is wrong, where such rows are not dropped."""
    return ConfigError(f"{key}: {row.where}: {error}; mend or remove it, or set data.invalid=drop")


def _fitted(sample: Encoded, config: Any, statistics: Statistics) -> Iterator[Encoded]:
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
