"""megatron-core's files of tokens: PREFIX.bin, the tokens one after the other, and PREFIX.idx, where each text begins.

An index is, little-endian: 9 bytes MMIDIDX\\0\\0, uint64 1, uint8 code of the tokens' type, uint64 number of sequences,
uint64 number of documents + 1; int32 lengths and int64 byte offsets of the sequences; int64 the documents' first
sequences, and their number. Imports no torch.
"""

import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from bridge.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")
TYPES: dict[int, Any] = {  # megatron-core's DType
    1: numpy.uint8,
    2: numpy.int8,
    3: numpy.int16,
    4: numpy.int32,
    5: numpy.int64,
    6: numpy.float64,
    7: numpy.float32,
    8: numpy.uint16,
}
FEW = 65500  # so many ids fit in 16 bits, with room for some more, by megatron-core's rule
BLOCK = 1 << 24  # tokens looked at together


class Index(NamedTuple):
    """An opened index. lengths: int32 [sequences]; documents: int64 [documents + 1], their first sequences."""

    dtype: Any
    lengths: NDArray[numpy.int32]
    documents: NDArray[numpy.int64]

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def tokens_before(self, document: int) -> int:
        """How many tokens the documents before this one have."""
        return int(self.lengths[: self.documents[document]].sum(dtype=numpy.int64))


def identity(prefix: str | Path) -> list[int | str]:
    """Changes when the files were written again."""
    stats = [os.stat(f"{prefix}{suffix}") for suffix in (".idx", ".bin")]
    return [str(prefix), *(value for stat in stats for value in (stat.st_size, stat.st_mtime_ns))]


def type_of(vocab_size: int) -> Any:
    """The smallest type that holds the ids of a vocabulary."""
    return numpy.uint16 if vocab_size < FEW else numpy.int32


def write_index(prefix: str | Path, lengths: NDArray[numpy.int32], *, dtype: Any) -> None:
    """PREFIX.idx for documents of these lengths, each of one sequence. It appears when it is whole."""
    offsets = numpy.zeros(len(lengths), dtype=numpy.int64)
    numpy.cumsum(lengths[:-1], out=offsets[1:])
    code = next(code for code, known in TYPES.items() if known == dtype)
    with open(f"{prefix}.idx.new", "wb") as file:
        file.write(HEAD.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        lengths.astype(numpy.int32).tofile(file)
        (offsets * numpy.dtype(dtype).itemsize).tofile(file)
        numpy.arange(len(lengths) + 1, dtype=numpy.int64).tofile(file)
    os.rename(f"{prefix}.idx.new", f"{prefix}.idx")


def read_index(prefix: str | Path, *, key: str = "data.path") -> Index:
    """The index of PREFIX, mapped. Raises ConfigError when it is not one, or does not fit its tokens."""
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(f"{prefix}{suffix}"):
            raise ConfigError(
                f"{key}: {prefix}{suffix} does not exist; set the path of a .bin and .idx without its suffix"
            )
    size = os.path.getsize(f"{prefix}.idx")
    with open(f"{prefix}.idx", "rb") as file:
        head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise ConfigError(
            f"{key}: {prefix}.idx is no index of megatron-core's; set the prefix of a .bin and .idx of its"
        )
    _, version, code, sequences, documents = HEAD.unpack(head)
    if version != 1 or code not in TYPES or numpy.dtype(TYPES[code]).kind not in "iu":
        raise ConfigError(
            f"{key}: {prefix}.idx has version {version} and type {code}; known: version 1, types 1-5 and 8"
        )
    if size < HEAD.size + 12 * sequences + 8 * documents:
        raise ConfigError(f"{key}: {prefix}.idx is cut off ({size} bytes for {sequences} sequences); write it again")
    if sequences == 0 or documents < 2:
        raise ConfigError(f"{key}: {prefix}.idx holds no document; set files that have some")
    lengths = numpy.memmap(f"{prefix}.idx", numpy.int32, "r", HEAD.size, (sequences,))
    firsts = numpy.memmap(f"{prefix}.idx", numpy.int64, "r", HEAD.size + 12 * sequences, (documents,))
    dtype = TYPES[code]
    needed = int(lengths.sum(dtype=numpy.int64)) * numpy.dtype(dtype).itemsize
    found = os.path.getsize(f"{prefix}.bin")
    if found != needed:
        fault = "is cut off" if found < needed else "is of another index"
        raise ConfigError(f"{key}: {prefix}.bin {fault} ({found} bytes, its index says {needed}); write both again")
    return Index(dtype, lengths, firsts)


def is_whole(prefix: str | Path) -> bool:
    """Whether PREFIX is there; one whose tokens a crash of the machine cut off is not."""
    try:
        read_index(prefix)
    except ConfigError:
        return False
    return True


def tokens(prefix: str | Path, index: Index) -> NDArray[Any]:
    """All tokens of PREFIX, mapped."""
    return numpy.memmap(f"{prefix}.bin", index.dtype, "r")


def largest_id(prefix: str | Path, index: Index) -> int:
    """Reads every token."""
    found = tokens(prefix, index)
    return max(int(found[start : start + BLOCK].max()) for start in range(0, len(found), BLOCK))


def counts(prefix: str | Path, index: Index, *, documents: slice, vocab_size: int, most: int) -> NDArray[numpy.int64]:
    """How often each id occurs in some documents, in their first `most` tokens; int64 [vocab_size]."""
    first, last = index.tokens_before(documents.start), index.tokens_before(documents.stop)
    found, total = tokens(prefix, index), numpy.zeros(vocab_size, dtype=numpy.int64)
    for start in range(first, min(last, first + most), BLOCK):
        total += numpy.bincount(found[start : min(start + BLOCK, last, first + most)], minlength=vocab_size)
    return total


def merge(prefixes: Iterable[str | Path], into: str | Path, *, dtype: Any) -> None:
    """One corpus of several, in their order, each document of one sequence. The index appears last."""
    lengths = [numpy.empty(0, dtype=numpy.int32)]
    with open(f"{into}.bin", "wb") as file:
        for prefix in prefixes:
            index = read_index(prefix)
            lengths.append(index.lengths)
            if index.dtype == dtype:
                with open(f"{prefix}.bin", "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 22)
            else:
                tokens(prefix, index).astype(dtype).tofile(file)
    write_index(into, numpy.concatenate(lengths), dtype=dtype)
