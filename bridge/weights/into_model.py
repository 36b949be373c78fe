"""Weights of Hugging Face or torch_dist files into a live, possibly sharded model. Every rank takes part."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bridge.weights import shards
from bridge.weights.dist_files import DistFiles
from bridge.weights.hf_files import HfFiles
from bridge.weights.key_layouts import canonical
from bridge.weights.ledger import Move, check_hf, check_megatron, plan
from bridge.weights.table import Table
from bridge.weights.transfer import check_ignored, merge, specs_of


def load_hf(model: Sequence[torch.nn.Module], hf: HfFiles, *, table: Table, vocab_size: int) -> None:
    """Copy each rank's part of every tensor straight out of the files, cast to the model's dtype.

    Raises ConversionError naming a tensor that is missing, left over or misshapen, before any is copied.
    """
    moves = plan(table, shards.targets(model), vocab_size=vocab_size)
    check_hf(moves, specs_of(hf), table=table, source=hf.directory)
    check_ignored(hf, table)
    shards.load(model, _Merged(hf, {move.mcore_key: move for move in moves}).read)


def load_megatron(model: Sequence[torch.nn.Module], dist: DistFiles, *, table: Table, vocab_size: int) -> None:
    """Copy each rank's part of every weight out of a torch_dist folder of any layout, cast to the model's dtype.

    The folder may have any of megatron-core's ways to name the tensors (`key_layouts`).
    Optimizer state is passed over. Raises ConversionError as `load_hf` does.
    """
    moves = plan(table, shards.targets(model), vocab_size=vocab_size)
    dist = canonical(dist, wanted=[move.mcore_key for move in moves])
    check_megatron(moves, specs_of(dist), source=dist.directory)
    padded = {move.mcore_key for move in moves if move.target.padded}

    def read(key: str, place: tuple[slice, ...]) -> Tensor:
        if key in padded:  # rows beyond the true vocabulary belong to the other model's padding
            rows = slice(min(place[0].start, vocab_size), min(place[0].stop, vocab_size))
            place = (rows, *place[1:])
        return dist.read(key, place)

    shards.load(model, read)


class _Merged:
    """Reads parts of merged tensors; keeps the last one, because a model may ask for several parts of it in a row."""

    def __init__(self, hf: HfFiles, moves: Mapping[str, Move]) -> None:
        self._hf, self._moves = hf, moves
        self._key, self._tensor = "", torch.empty(0)

    def read(self, key: str, place: tuple[slice, ...]) -> Tensor:
        if key != self._key:
            self._key, self._tensor = key, merge(self._hf, self._moves[key])
        return self._tensor[place]
