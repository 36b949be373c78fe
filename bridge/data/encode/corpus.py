"""From a list of documents to a stored, tokenised corpus. Shared by the sources whose samples are plain text."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge.config import durations
from bridge.data.encode import tokenizer as bpe
from bridge.data.source import Prepared, completed
from bridge.weights.hf_assets import copy_tokenizer

FORMAT = 1  # part of the cache key: raise it when the stored files change their meaning
BATCH = 256  # documents tokenised at once
INTERVAL = 10.0  # seconds between two lines on how far it is
MANIFEST = "manifest.json"


class Options(NamedTuple):
    """What the samples depend on, besides the text and the seed."""

    sequence_length: int
    split: str
    vocab_size: int
    tokenizer: Path | None

    @classmethod
    def of(cls, config: Any) -> "Options":
        path = None if config.tokenizer is None else Path(config.tokenizer).expanduser().absolute()
        return cls(config.sequence_length, config.split, config.vocab_size, path)


def prepare(documents: Sequence[str], *, name: str, title: str, options: Options, cache: Path, seed: int) -> Prepared:
    """Tokenise `documents` (at first use), store them as megatron-core .bin/.idx and index the samples.

    The entry below `cache` is keyed by the text, the tokenizer settings and the split; a change makes a new entry.
    """
    from bridge.data.samples import concatenated

    entry = cache / f"{name}-{_key(documents, options)}"
    completed(entry, fill=lambda directory: _fill(directory, documents, title=title, options=options))
    manifest = json.loads((entry / MANIFEST).read_text())
    prepared = Prepared(
        directory=entry,
        vocab_size=manifest["vocab_size"],
        tokenizer=entry / "tokenizer",
        unigram_entropy=manifest["unigram_entropy"],
    )
    concatenated.index(prepared, sequence_length=options.sequence_length, split=options.split, seed=seed)
    return prepared


def _key(documents: Sequence[str], options: Options) -> str:
    digest = hashlib.sha256()
    tokenizer = None if options.tokenizer is None else bpe.load(options.tokenizer).tokenizer.to_str()
    digest.update(json.dumps([FORMAT, options.split, options.vocab_size, tokenizer]).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()[:16]


def _fill(directory: Path, documents: Sequence[str], *, title: str, options: Options) -> None:
    from bridge.data.samples import concatenated

    size = sum(map(len, documents))
    num_train = concatenated.num_train_documents(len(documents), split=options.split)
    if options.tokenizer is None:
        print(f"data: {title}, {size / 1e6:.1f} M characters; training a {options.vocab_size}-token BPE", flush=True)
        tokenizer = bpe.train(documents[:num_train], vocab_size=options.vocab_size)
    else:
        print(f"data: {title}, {size / 1e6:.1f} M characters; tokenizer {options.tokenizer}", flush=True)
        tokenizer = bpe.load(options.tokenizer)
    _store_tokenizer(tokenizer, directory / "tokenizer", source=options.tokenizer)
    counts = concatenated.write(
        directory, _tokenised(documents, tokenizer), vocab_size=tokenizer.vocab_size, num_train=num_train
    )
    manifest = {
        "documents": len(documents),
        "characters": size,
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
        **dataclasses.asdict(counts),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    entropy = ""
    if counts.unigram_entropy is not None:
        entropy = f"; unigram entropy of the held-out part {counts.unigram_entropy:.3f} nats per token"
    print(f"data: {counts.train_tokens:,} training and {counts.heldout_tokens:,} held-out tokens{entropy}", flush=True)


def _store_tokenizer(tokenizer: bpe.TextTokenizer, directory: Path, *, source: Path | None) -> None:
    if source is None:
        bpe.save(tokenizer, directory)
        return
    directory.mkdir()
    copy_tokenizer(source, directory)


def _tokenised(documents: Sequence[str], tokenizer: bpe.TextTokenizer) -> Iterator[list[int]]:
    began = told = time.monotonic()
    for start in range(0, len(documents), BATCH):
        yield from tokenizer.encode(documents[start : start + BATCH])
        done, now = min(start + BATCH, len(documents)), time.monotonic()
        if now - told >= INTERVAL and done < len(documents):
            told, left = now, (now - began) / done * (len(documents) - done)
            print(f"data: tokenised {done} of {len(documents)} documents, {durations.text(left)} left", flush=True)
