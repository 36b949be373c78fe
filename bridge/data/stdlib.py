"""Real text that is on every machine: the source files of the installed Python's own standard library."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bridge.data.samples import texts
from bridge.data.source import Prepared, SourceConfig, at_least, digest
from bridge.data.split import check_split
from bridge.errors import ConfigError

# Packages installed by the user, test suites, and modules that are tables of characters or prose rather than code.
EXCLUDED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "encodings",
        "pydoc_data",
        "turtledemo",
        "lib2to3",
    }
)
SMALLEST_VOCABULARY = 257  # all bytes and the end of a document


@dataclass(frozen=True)
class Config(SourceConfig):
    """Text of the standard library, tokenised with a byte-level BPE trained on the training part of it."""

    source: str = "stdlib"
    vocab_size: int = at_least(1, 2048)
    split: str = "95,5"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.tokenizer is None and self.vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"data.vocab_size: {self.vocab_size} is too few for all bytes; set {SMALLEST_VOCABULARY} or more"
            )


class Document(NamedTuple):
    name: str
    text: str


def documents(root: Path | None = None) -> list[Document]:
    """The source files under `root` (default: the running Python's standard library).

    They come in the order of the hash of their relative name: the same on every machine, and unlike the alphabet it
    spreads each package over the training and the held-out part.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            found.append(Document(relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return sorted((document for document in found if document.text), key=_hash_of_name)


def _hash_of_name(document: Document) -> str:
    return hashlib.sha256(document.name.encode()).hexdigest()


def check(config: Config) -> None:
    """Raises ConfigError when data.tokenizer names no tokenizer."""
    texts.check_tokenizer(config.tokenizer)


def prepare(config: Config, *, cache: Path, seed: int) -> Prepared:
    """Tokenised standard library below `cache`, made at first use. `seed` orders the samples."""
    from bridge.data.encode import corpus
    from bridge.data.samples import concatenated

    files = documents()
    if not files:
        raise ConfigError("data.source: this Python has no library sources on disk; set another data source")
    sources = [document.text for document in files]
    size = sum(map(len, sources))
    training = concatenated.num_train_documents(len(sources), split=config.split)
    library = corpus.Corpus(
        name="stdlib",
        title=f"Python standard library: {len(files)} files, {size / 1e6:.1f} M characters",
        identity=digest(training, sources),
        size=size,
        texts=lambda: sources,
        to_learn_from=lambda: sources[:training],
    )
    tokens = corpus.tokenise([library], corpus.Options.of(config), cache=cache)
    mixture = concatenated.Mixture(dict.fromkeys(tokens.prefixes, 1.0), {}, config.split, tokens.vocab_size)
    return concatenated.prepare(
        "stdlib",
        mixture,
        tokenizer=tokens.tokenizer,
        cache=cache,
        sequence_length=config.sequence_length,
        seed=seed,
    )


build = texts.build
