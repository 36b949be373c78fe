"""From texts to stored, tokenised corpora. Shared by the sources whose samples are plain text."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bridge.data.encode import engine, sharding
from bridge.data.encode import tokenizer as bpe
from bridge.data.encode.tokens import Tokenise, write_shard
from bridge.data.samples import bin_idx
from bridge.data.source import completed, digest
from bridge.errors import ConfigError

FORMAT = 2  # part of the cache keys: raise it when the stored files change their meaning
PREFIX = "tokens"  # tokens.bin and tokens.idx in the entry of a corpus


class Corpus(NamedTuple):
    """Texts that are read anew each time they are needed."""

    name: str
    title: str
    identity: str  # changes with the texts
    size: int  # bytes of the input
    texts: Callable[[], Iterable[str]]
    to_learn_from: Callable[[], Iterable[str]]  # what a new tokenizer is trained on
    part: Callable[[int, int], Iterable[str]] | None = None  # part n of N of `texts`; can be pickled
    share_read: Callable[[], float] = lambda: 1.0  # of the input, by the iterator that `texts` made last


class Options(NamedTuple):
    """What the tokens depend on, besides the texts. tokenizer: None: one of vocab_size ids is trained."""

    vocab_size: int
    tokenizer: Path | None
    end_of_document: str | None = None
    num_processes: int | None = None
    engine: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: Any) -> "Options":
        path = None if config.tokenizer is None else Path(config.tokenizer).expanduser().absolute()
        more = {
            name: getattr(config, name)
            for name in ("end_of_document", "num_processes", "engine")
            if hasattr(config, name)
        }
        return cls(config.vocab_size, path, **more)


class Tokenised(NamedTuple):
    """Where the tokens of corpora are: prefixes of .bin and .idx. tokenizer: a Hugging Face directory."""

    prefixes: list[str]
    tokenizer: Path
    vocab_size: int


def tokenise(corpora: Sequence[Corpus], options: Options, *, cache: Path) -> Tokenised:
    """The tokens of each of `corpora`, made at first use; all with the tokenizer of `options` or one new one."""
    directory = options.tokenizer or _trained(corpora, options.vocab_size, cache=cache)
    tokenizer = bpe.load(directory, end_of_document=options.end_of_document)
    facts = [FORMAT, tokenizer.tokenizer.to_str(), tokenizer.end_of_document]
    prefixes = []
    for corpus in corpora:
        entry = cache / f"{corpus.name}-{digest(*facts, corpus.identity)}"
        fill = _Fill(corpus, tokenizer, Tokenise(directory, options.end_of_document), options)
        completed(entry, fill=fill, resumable=True)
        prefixes.append(str(entry / PREFIX))
    return Tokenised(prefixes, directory, tokenizer.vocab_size)


def _trained(corpora: Sequence[Corpus], vocab_size: int, *, cache: Path) -> Path:
    def fill(directory: Path) -> None:
        titles = " and ".join(corpus.title for corpus in corpora)
        print(f"data: {titles}; training a {vocab_size}-token BPE", flush=True)
        texts = (text for corpus in corpora for text in corpus.to_learn_from())
        bpe.save(bpe.train(texts, vocab_size=vocab_size), directory)

    identities = [corpus.identity for corpus in corpora]
    return completed(cache / f"tokenizer-{digest(FORMAT, vocab_size, identities)}", fill=fill)


@dataclass(frozen=True)
class _Fill:
    """Makes the entry of a corpus: shards of it, which survive a kill, and then one of them all."""

    corpus: Corpus
    tokenizer: bpe.TextTokenizer
    job: Tokenise
    options: Options

    def __call__(self, directory: Path) -> None:
        corpus = self.corpus
        print(f"data: {corpus.title}; tokenizer {self.job.tokenizer}", flush=True)
        shards = directory / "shards"
        shards.mkdir(exist_ok=True)
        prefixes = self._by_engine(shards) if self.options.engine else self._by_processes(shards)
        if not prefixes:
            raise ConfigError(f"data.path: {corpus.title} holds no text; set files that have some")
        bin_idx.merge(prefixes, directory / PREFIX, dtype=bin_idx.type_of(self.tokenizer.vocab_size))
        shutil.rmtree(shards, ignore_errors=True)  # datatrove's last Slurm job may still write its report there

    def _by_engine(self, shards: Path) -> list[str]:
        assert self.corpus.part is not None and self.options.engine is not None
        end = self.tokenizer.tokenizer.id_to_token(self.tokenizer.end_of_document)
        assert end is not None
        return engine.write(engine.Work(shards, self.corpus.part, self.job.tokenizer, end, self.options.engine))

    def _by_processes(self, shards: Path) -> list[str]:
        corpus = self.corpus
        found = sharding.chunks(corpus.texts(), size=corpus.size, share_read=corpus.share_read)
        number = sharding.num_processes(self.options.num_processes, corpus.size)
        here = partial(write_shard, tokenizer=self.tokenizer)
        return sharding.write(shards, found, job=self.job, here=here, num_processes=number)


def first_characters(texts: Iterable[str], *, most: int) -> Iterator[str]:
    """The first of `texts`, until they have `most` characters."""
    for text in texts:
        if most <= 0:
            return
        most -= len(text)
        yield text
