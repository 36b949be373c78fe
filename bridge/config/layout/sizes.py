"""What the rules read: the sizes of a layout and of a batch, and the configuration by field name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bridge.config.divisibility import Number
from bridge.config.routing import Routed


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


class Fields:
    """Reads `Routed` by field name."""

    def __init__(self, routed: Routed) -> None:
        self._origin = routed.origin
        self._values = {**routed.optimizer, **routed.ddp, **routed.gpt, **routed.transformer}

    def get(self, name: str, default: Any = None) -> Any:
        """The value the user set, else `default`, which is megatron-core's."""
        value = self._values.get(name)
        return default if value is None else value

    def key(self, name: str) -> str:
        return self._origin.get(name, name)

    def number(self, name: str, default: int = 1) -> Number:
        return Number(name, self.get(name, default), self._origin.get(name, ""))


def dp_formula(layout: Layout) -> str:
    sizes = f"{layout.world_size} / ({layout.tp} x {layout.pp} x {layout.cp})"
    return f" (DP = processes / (TP x PP x CP) = {sizes} = {layout.dp})"
