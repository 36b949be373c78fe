"""What encoding gives."""

from collections.abc import Sequence
from typing import NamedTuple


class Encoded(NamedTuple):
    """One sample. weights: as many as tokens, float32: how much predicting that token counts, 0 not at all."""

    tokens: Sequence[int]
    weights: Sequence[float]
    file: str
    line: int
