"""Text of your own: files of documents, tokenised at first use."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.data import blend
from bridge.data.encode import corpus, engine
from bridge.data.encode.text import documents, text_of
from bridge.data.readers import files, reader
from bridge.data.samples import texts
from bridge.data.source import Prepared, SourceConfig, at_least
from bridge.data.split import check_split
from bridge.errors import ConfigError

LEARNED_FROM = 1 << 25  # characters a new tokenizer is trained on


@dataclass(frozen=True)
class Config(SourceConfig):
    """path: a path, a list of them, or {path: weight}. eval: a path or list of them, or {name: path}."""

    source: str = "text"
    path: str | list[str] | dict[str, float] | None = None
    field: str = "text"
    eval: str | list[str] | dict[str, Any] | None = None
    split: str = "95,5"
    tokenizer: str | None = None
    vocab_size: int = at_least(257, 2048)
    end_of_document: str | None = None
    num_processes: int | None = at_least(1, None)  # type: ignore[arg-type]
    engine: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.path is None:
            raise ConfigError("data.path: is not set; set the file, folder or pattern of the texts to train on")


def check(config: Config) -> None:
    """Raises ConfigError when a path names no text, the text has another name, or the tokenizer is none."""
    engine.check(config.engine)
    for key, path in _paths(config):
        text_of(reader.check(path, key=key), field=config.field)
    if config.tokenizer is not None:
        from bridge.data.encode import tokenizer

        tokenizer.load(Path(config.tokenizer).expanduser(), end_of_document=config.end_of_document)


def _paths(config: Config) -> Iterable[tuple[str, blend.Path]]:
    assert config.path is not None
    yield from (("data.path", path) for path, _ in blend.weighted(config.path))
    yield from ((blend.eval_key(name), path) for name, path in blend.evaluated(config.eval).items())


def prepare(config: Config, *, cache: Path, seed: int) -> Prepared:
    """The tokenised texts below `cache`, made at first use. `seed` orders the samples."""
    from bridge.data.samples import concatenated

    assert config.path is not None
    corpora = [corpus_of(path, key=key, field=config.field) for key, path in _paths(config)]
    count = len(blend.weighted(config.path))  # no tokenizer learns from what is held out
    corpora[count:] = [held_out._replace(to_learn_from=tuple) for held_out in corpora[count:]]
    tokens = corpus.tokenise(corpora, corpus.Options.of(config), cache=cache)
    weights, names = [weight for _, weight in blend.weighted(config.path)], blend.evaluated(config.eval)
    mixture = concatenated.Mixture(
        train=dict(zip(tokens.prefixes, weights, strict=False)),
        valid={name: [prefix] for name, prefix in zip(names, tokens.prefixes[len(weights) :], strict=True)},
        split=config.split,
        vocab_size=tokens.vocab_size,
    )
    return concatenated.prepare(
        "text",
        mixture,
        tokenizer=tokens.tokenizer,
        cache=cache,
        sequence_length=config.sequence_length,
        seed=seed,
    )


build = texts.build


@dataclass(frozen=True)
class _Texts:
    """The texts of a path, or part n of N of them: so many of the files that follow each other."""

    path: blend.Path
    key: str
    field: str

    def __call__(self, part: int = 0, parts: int = 1, meter: files.Meter | None = None) -> Iterable[str]:
        rows = reader.rows(self.path, key=self.key, meter=meter, part=part, parts=parts)
        return documents(rows, field=self.field)


def corpus_of(path: blend.Path, *, key: str, field: str) -> corpus.Corpus:
    """What there is to tokenise at `path`; `key` is named in errors."""
    meter, texts = files.Meter(), _Texts(path, key, field)
    size = files.size(path, key=key)

    def all_texts() -> Iterable[str]:
        meter.read = 0
        return texts(meter=meter)

    return corpus.Corpus(
        name="corpus",
        title=f"{blend.title(path)}, {size / 1e6:.1f} MB",
        identity=f"{files.identity(path, key=key)} {field}",
        size=size,
        texts=all_texts,
        to_learn_from=lambda: corpus.first_characters(texts(), most=LEARNED_FROM),
        share_read=lambda: meter.share(size),
        part=texts,
    )
