"""Which samples a step reads: a pure function of the seed and the number of samples consumed before it.

Nothing here depends on the number of processes, so a run that resumes with another data-parallel size reads on where it
stopped, and a resumed run reads what the uninterrupted one would have read, across epochs too.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

FILLER = -1  # instead of an index: a sample that does not count, where there are not enough for whole micro-batches
ROUNDS = 6
WORD = (1 << 64) - 1


def sample_ids(consumed: int, count: int, *, size: int, seed: int) -> list[int]:
    """Dataset indices of samples `consumed` .. `consumed + count - 1` of the endless sequence of shuffled epochs.

    `size` is the length of the dataset; each epoch holds every index once, in an order of its own.
    """
    ids = []
    for position in range(consumed, consumed + count):
        epoch, place = divmod(position, size)
        ids.append(_shuffled(place, size=size, key=_mixed(_mixed(seed) + epoch)))
    return ids


def _shuffled(place: int, *, size: int, key: int) -> int:
    """Where `place` lands in the permutation of range(size) that `key` selects, in constant time and memory.

    A Feistel network permutes the smallest even number of bits that holds `size`; a result outside is sent through
    again until it is inside (cycle walking: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). A stored
    permutation of the billion samples of a large corpus would take 8 GB in every process.
    """
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (_mixed(key + number * size + right) & mask)
        place = left << half | right
        if place < size:
            return place


def _mixed(word: int) -> int:
    """A 64-bit hash: a step of SplitMix64 (Steele et al., Fast Splittable Pseudorandom Number Generators, 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def rank_micro_batches(ids: Sequence[int], *, micro_batch_size: int, rank: int, num_ranks: int) -> list[list[int]]:
    """The micro-batches of data-parallel `rank` in a step that reads the samples `ids`, in the order they are run."""
    stride = micro_batch_size * num_ranks
    assert len(ids) % stride == 0, f"{len(ids)} samples do not divide into {num_ranks} x {micro_batch_size}"
    starts = range(rank * micro_batch_size, len(ids), stride)
    return [list(ids[start : start + micro_batch_size]) for start in starts]


class TrainingBatches(torch.utils.data.Sampler[list[int]]):
    """Batch sampler for a DataLoader: the rank's micro-batches of every step after `consumed` samples, without end.

    total: samples in all, after which there are FILLERs only, as in the rest of the batch in which they end.
    """

    def __init__(
        self,
        *,
        size: int,
        seed: int,
        consumed: int,
        batch_size_at: Callable[[int], int],
        micro_batch_size: int,
        rank: int,
        num_ranks: int,
        total: int | None = None,
    ) -> None:
        """`batch_size_at(consumed)` is the global batch size of the step that starts after `consumed` samples."""
        self.size, self.seed, self.consumed, self.total = size, seed, consumed, total
        self.batch_size_at = batch_size_at
        self.micro_batch_size, self.rank, self.num_ranks = micro_batch_size, rank, num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        consumed = self.consumed
        while True:
            count = self.batch_size_at(consumed)
            left = count if self.total is None else max(0, min(count, self.total - consumed))
            ids = sample_ids(consumed, left, size=self.size, seed=self.seed) + [FILLER] * (count - left)
            yield from rank_micro_batches(
                ids, micro_batch_size=self.micro_batch_size, rank=self.rank, num_ranks=self.num_ranks
            )
            consumed += count
