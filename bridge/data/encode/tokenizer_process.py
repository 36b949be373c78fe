"""A process that tokenises: `python -m bridge.data.encode.tokenizer_process SOCKET`, started by `sharding`.

Gets a `Job`, then texts with the prefix of the shard to make of them; answers with the number of tokens.
"""

from bridge.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy

from bridge.data.encode import tokenizer as bpe
from bridge.data.samples import bin_idx

BATCH = 1 << 20  # characters encoded at once: an encoding takes a hundred times its ids


class Job(NamedTuple):
    tokenizer: Path
    end_of_document: str | None


def write_shard(prefix: str, texts: Sequence[str], tokenizer: bpe.TextTokenizer) -> int:
    """PREFIX.bin and .idx of `texts`; how many tokens they are."""
    lengths: list[int] = []
    dtype = bin_idx.type_of(tokenizer.vocab_size)
    with open(f"{prefix}.bin", "wb") as file:
        for batch in _batches(texts):
            for ids in tokenizer.encode(batch):
                numpy.array(ids, dtype=dtype).tofile(file)
                lengths.append(len(ids))
    bin_idx.write_index(prefix, numpy.array(lengths, dtype=numpy.int32), dtype=dtype)
    return sum(lengths)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = size = 0
    for number, text in enumerate(texts):
        size += len(text)
        if size >= BATCH:
            yield texts[start : number + 1]
            start, size = number + 1, 0
    if start < len(texts):
        yield texts[start:]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too, and ends this process
    with Connection(int(sys.argv[1])) as parent:
        job: Job = parent.recv()
        tokenizer = bpe.load(job.tokenizer, end_of_document=job.end_of_document)
        while True:
            try:
                prefix, texts = parent.recv()
            except EOFError:
                return
            parent.send(write_shard(prefix, texts, tokenizer))


if __name__ == "__main__":
    main()
