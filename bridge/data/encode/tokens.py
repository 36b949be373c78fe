"""Texts become a shard of tokens."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy

from bridge.data.encode import tokenizer as bpe
from bridge.data.encode.sharding import Made, Work
from bridge.data.samples import bin_idx

BATCH = 1 << 20  # characters encoded at once: an encoding takes a hundred times its ids


class Tokenise(NamedTuple):
    """The `sharding.Job`. tokenizer: a Hugging Face directory."""

    tokenizer: Path
    end_of_document: str | None

    @property
    def unit(self) -> str:
        return "docs"

    def is_whole(self, prefix: str) -> bool:
        return bin_idx.is_whole(prefix)

    def start(self) -> Work:
        return partial(write_shard, tokenizer=bpe.load(self.tokenizer, end_of_document=self.end_of_document))


def write_shard(prefix: str, texts: Sequence[str], *, tokenizer: bpe.TextTokenizer) -> Made:
    """PREFIX.bin and .idx of `texts`."""
    lengths: list[int] = []
    dtype = bin_idx.type_of(tokenizer.vocab_size)
    with open(f"{prefix}.bin", "wb") as file:
        for batch in _batches(texts):
            for ids in tokenizer.encode(batch):
                numpy.array(ids, dtype=dtype).tofile(file)
                lengths.append(len(ids))
    bin_idx.write_index(prefix, numpy.array(lengths, dtype=numpy.int32), dtype=dtype)
    return Made(len(texts), sum(lengths))


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = size = 0
    for number, text in enumerate(texts):
        size += len(text)
        if size >= BATCH:
            yield texts[start : number + 1]
            start, size = number + 1, 0
    if start < len(texts):
        yield texts[start:]
