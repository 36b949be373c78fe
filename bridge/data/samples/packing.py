"""Which samples share a row: best fit decreasing (Johnson 1973), the fullest row that still has room, long ones first.

Never more than 11/9 of the fewest possible rows and 4 more; rows of many short samples are nearly full.
"""

import numpy
from numpy.typing import NDArray

BITS = 10  # of a length that count inside one word of `_Rooms`


class _Rooms:
    """Open rows by the room they have left; the smallest room that is enough is found in two looks at a bit mask."""

    def __init__(self, capacity: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(capacity + 1)]
        self.words = [0] * ((capacity >> BITS) + 1)
        self.summary = 0  # bit w: words[w] is not 0

    def put(self, row: int, room: int) -> None:
        """`row` has this much room."""
        self.rows[room].append(row)
        self.words[room >> BITS] |= 1 << (room & (1 << BITS) - 1)
        self.summary |= 1 << (room >> BITS)

    def take(self, length: int) -> tuple[int, int] | None:
        """Take out a row with the least room that is enough: (row, room). None: there is none."""
        number, rest = length >> BITS, length & (1 << BITS) - 1
        word = self.words[number] >> rest
        if word:
            room = length + _lowest(word)
        else:
            later = self.summary >> number + 1
            if not later:
                return None
            number += 1 + _lowest(later)
            room = (number << BITS) + _lowest(self.words[number])
        rows = self.rows[room]
        row = rows.pop()
        if not rows:
            self.words[room >> BITS] &= ~(1 << (room & (1 << BITS) - 1))
            if not self.words[room >> BITS]:
                self.summary &= ~(1 << (room >> BITS))
        return row, room


def _lowest(word: int) -> int:
    """The number of the lowest bit that is set."""
    return (word & -word).bit_length() - 1


def pack(lengths: NDArray[numpy.int64], *, row: int, seed: int) -> list[list[int]]:
    """For each row, the numbers of the samples in it. `lengths` int64 [samples], each from 1 to `row` tokens.

    The same for the same arguments; `seed` decides between samples of one length.
    """
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= row), "samples fit into a row"
    shuffled = numpy.random.RandomState(seed % 2**32).permutation(len(lengths))
    order = shuffled[numpy.argsort(-lengths[shuffled], kind="stable")]
    rooms, packed = _Rooms(row), list[list[int]]()
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        found = rooms.take(length)
        if found is None:
            found = (len(packed), row)
            packed.append([])
        number, room = found
        packed[number].append(sample)
        if room > length:
            rooms.put(number, room - length)
    return packed
