"""The weights of a live model as a stream of whole Hugging Face tensors, and as tasks to stream in parts.

A task is the least that gives whole tensors on the Hugging Face side: one Megatron tensor, or all entries of a stack
(the experts of a layer, where a family's files keep them in one tensor).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.config.routing import Routed, route
from bridge.errors import ConfigError
from bridge.models import family
from bridge.sources.same import model_section
from bridge.weights import names, shards
from bridge.weights.ledger import Move, plan
from bridge.weights.progress import Progress
from bridge.weights.spec import TensorSpec
from bridge.weights.transfer import split


class HFWeightTuple(NamedTuple):
    """A whole tensor and its name in Hugging Face files."""

    param_name: str
    weight: Tensor


class ConversionTask(NamedTuple):
    """What `export_hf_weights` does in one piece, the same on every rank."""

    param_name: str  # the Megatron tensor, by its checkpoint key; of a stack the first entry
    hf_names: tuple[str, ...]  # what comes out
    num_bytes: int  # of all that comes out
    moves: tuple[Move, ...]
    copies: tuple[tuple[str, str], ...]  # (copy, original) of what every file of the family holds twice


class ModelSection(NamedTuple):
    """A model's `model` section, and what follows from it."""

    routed: Routed
    section: dict[str, Any]


def chunks_of(model: Any) -> list[Any]:
    """A model as the list of this rank's chunks; one chunk may be given alone."""
    return list(model) if isinstance(model, list | tuple | torch.nn.ModuleList) else [model]


def describe(model: Sequence[Any], *, section: Mapping[str, Any] | None = None) -> ModelSection:
    """How `model` was configured; `section` counts for a GPTModel that this package did not build.

    Raises ConfigError when neither says so.
    """
    routed = getattr(shards.unwrap(model[0]), "routed", None)
    if routed is not None:
        return ModelSection(routed, model_section(routed))
    if section is None:
        raise ConfigError("model: was not built by this package; use the methods of bridge.AutoBridge for its weights")
    return ModelSection(route({"model": section}), dict(section))


def tasks(model: Sequence[Any], described: ModelSection) -> list[ConversionTask]:
    """One task after the other for all weights of a sharded model, in the model's order. A collective."""
    table = family.by_name(described.routed.family).table(described.section)
    moves = plan(table, shards.targets(model), vocab_size=described.routed.gpt["vocab_size"])
    groups: dict[tuple[str, ...], list[Move]] = {}
    for move in moves:
        stacks = [base for base, index in map(names.split_index, move.hf_names) if index]
        groups.setdefault(tuple(stacks) or (move.mcore_key,), []).append(move)
    return [_task(group, table.copies()) for group in groups.values()]


def _task(moves: list[Move], copies: Mapping[str, str]) -> ConversionTask:
    specs = _specs(moves, copies.items())
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    own = tuple((copy, original) for copy, original in copies.items() if original in specs)
    return ConversionTask(moves[0].mcore_key, tuple(specs), num_bytes, tuple(moves), own)


def _specs(moves: Iterable[Move], copies: Iterable[tuple[str, str]]) -> dict[str, TensorSpec]:
    specs = names.stack(
        {
            name: TensorSpec(move.target.dtype, shape)
            for move in moves
            for name, shape in zip(move.hf_names, move.hf_shapes, strict=True)
        }
    )
    return specs | {copy: specs[original] for copy, original in copies if original in specs}


def specs_of(todo: Iterable[ConversionTask]) -> dict[str, TensorSpec]:
    """Name, dtype and shape of everything `stream` will yield, without gathering."""
    return {name: spec for task in todo for name, spec in _specs(task.moves, task.copies).items()}


def stream(
    model: Sequence[Any], todo: Sequence[ConversionTask], *, cpu: bool = False, progress: Progress | None = None
) -> Iterator[HFWeightTuple]:
    """The tensors of tasks, whole, on every rank, one at a time; copies in the model's dtype, on its device or the CPU.

    All ranks must run through the iterator together, with the same tasks.
    """
    gathered = shards.gather(model, [move.mcore_key for task in todo for move in task.moves])
    for task in todo:
        for original, tensor in _whole(gathered, task):
            for name in (original, *(copy for copy, of in task.copies if of == original)):
                yield HFWeightTuple(name, tensor.cpu() if cpu else tensor)
                if progress is not None:
                    progress.add(tensor.nbytes, name=name)


def _whole(gathered: Iterator[tuple[str, Tensor]], task: ConversionTask) -> Iterator[tuple[str, Tensor]]:
    """What one task gives: tensors as they come, stacks when their last entry is there."""
    stacks: dict[str, Tensor] = {}
    for move in task.moves:
        _, whole = next(gathered)
        for name, part in zip(move.hf_names, split(whole, move), strict=True):
            base, index = names.split_index(name)
            if not index:
                yield name, part
                continue
            if base not in stacks:
                stacks[base] = part.new_empty((len(task.moves), *part.shape))
            stacks[base][index] = part
    yield from stacks.items()
