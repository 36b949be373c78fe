"""What the rules read besides the configuration: the sizes of a layout and of a batch."""

from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """How many processes share what. world_size = tp * pp * cp * dp."""

    tp: int  # each weight matrix
    pp: int  # the layers
    cp: int  # each sequence
    ep: int  # the experts
    etp: int  # each expert's weight matrices
    dp: int  # the batch
    vpp: int  # chunks of layers per process; 1: no interleaving
    world_size: int


class Batch(NamedTuple):
    """Batch sizes in sequences, the sequence in tokens. rampup: [start, increment, samples]."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    rampup: Sequence[int] | None


def dp_formula(layout: Layout) -> str:
    sizes = f"{layout.world_size} / ({layout.tp} x {layout.pp} x {layout.cp})"
    return f" (DP = processes / (TP x PP x CP) = {sizes} = {layout.dp})"
