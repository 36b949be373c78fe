"""The offline streams: safetensors to torch_dist and back, one Megatron tensor in memory at a time.

A Megatron tensor is stored in its source's dtype. Where the Hugging Face parts of one fused tensor differ in dtype, it
takes the type that holds them all exactly, and the form beside the tensors keeps the parts' own for the export.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.errors import ConversionError
from bridge.weights import finite, output, workers
from bridge.weights.dist_files import DataFile, DistFiles, DistWriter
from bridge.weights.hf_files import NAMES, HfFiles, HfWriter
from bridge.weights.hf_form import HfForm, read_form, write_form
from bridge.weights.ledger import Ledger, Move, check_hf, check_megatron
from bridge.weights.names import spread
from bridge.weights.progress import Progress
from bridge.weights.spec import TensorSpec
from bridge.weights.table import Table


def import_tensors(
    hf: HfFiles,
    directory: Path,
    *,
    moves: Sequence[Move],
    table: Table,
    dtype: torch.dtype | None,
    spelling: str = "",
    object_keys: Iterable[str] = (),
    check_finite: bool = False,
    num_workers: int | None = 1,
) -> str:
    """Write every move's tensor into a new torch_dist folder `directory`; the summary line.

    `dtype` casts floating-point tensors; None keeps each source's. `spelling` is the table's. `object_keys` are written
    as empty objects. `check_finite` refuses NaN and infinity. `num_workers` threads share the work; None: as many as
    make sense. Raises ConversionError naming what is missing, left over, misshapen, damaged or not finite, or that the
    disk is full: all that can be known beforehand before anything is written.
    """
    check_hf(moves, specs_of(hf), table=table, source=hf.directory)
    ignored = check_ignored(hf, table)
    wanted = [name for move in moves for name in move.hf_names]
    ledger = Ledger(read=spread(specs_of(hf), wanted=wanted), written=[move.mcore_key for move in moves])
    sizes = [sum(hf.spec(name).num_bytes for name in move.hf_names) for move in moves]
    output.check_space(directory, sum(sizes) if dtype is None else _num_bytes_at(dtype, hf, moves))
    progress = Progress("import", num_tensors=len(moves), num_bytes=sum(sizes))
    for name in ignored.names:
        ledger.read(name)
    with DistWriter(directory) as writer:

        @contextmanager
        def open_task(number: int) -> Iterator[workers.Task]:
            with DataFile(directory, number) if number else nullcontext(writer.file) as file:
                # No name holds the tensor: the next one is not read while this one is still in memory.
                yield lambda index: file.write(
                    moves[index].mcore_key, _imported(hf, moves[index], dtype=dtype, check_finite=check_finite)
                )

        num_workers = workers.count(num_workers, num_bytes=sum(sizes), largest=max(sizes, default=0))
        for index, written in workers.results(open_task, num_tasks=len(moves), num_workers=num_workers):
            writer.add(written)
            ledger.wrote(moves[index].mcore_key)
            for name in moves[index].hf_names:
                ledger.read(name)
            progress.add(sizes[index], name=moves[index].mcore_key)
        for key in object_keys:
            writer.write_empty_object(key)
        ledger.balance()
    write_form(directory, HfForm(spelling, {} if dtype else _part_dtypes(hf, moves), ignored.copies))
    return progress.finish()


def _imported(hf: HfFiles, move: Move, *, dtype: torch.dtype | None, check_finite: bool) -> Tensor:
    """What an import writes for a move."""
    tensor = merge(hf, move)
    if check_finite:
        finite.check_finite(hf, move, tensor)
    return pad_rows(cast(tensor, _wanted(move, dtype)), move)


def _wanted(move: Move, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that a cast to `dtype` gives the tensors of a move; None: their own."""
    return None if move.keep_dtype and dtype != torch.float32 else dtype


def _num_bytes_at(dtype: torch.dtype, hf: HfFiles, moves: Iterable[Move]) -> int:
    """Bytes of all tensors after a cast; those that keep their dtype are few and small."""
    return sum(
        TensorSpec(dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape).num_bytes
        for spec in (hf.spec(name) for move in moves for name in move.hf_names)
    )


def export_tensors(
    dist: DistFiles,
    directory: Path,
    *,
    moves: Sequence[Move],
    table: Table,
    dtype: torch.dtype | None,
    max_shard_size: int,
    num_workers: int | None = 1,
) -> str:
    """Write every move's Hugging Face tensors into safetensors files in `directory`; the summary line.

    Optimizer state in `dist` is passed over. `num_workers` and ConversionError as in `import_tensors`.
    """
    check_megatron(moves, specs_of(dist), source=dist.directory)
    specs = export_specs(dist, moves=moves, dtype=dtype)
    copies = copies_of(table, read_form(dist.directory), specs)
    specs |= {copy: specs[original] for copy, original in copies.items()}
    ledger = Ledger(read=[move.mcore_key for move in moves], written=specs)
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    output.check_space(directory, num_bytes)
    progress = Progress("export", num_tensors=len(specs), num_bytes=num_bytes)
    writer = HfWriter(directory, specs, max_shard_size=max_shard_size)

    @contextmanager
    def open_task(_: int) -> Iterator[workers.Task]:
        yield lambda index: _export_one(dist, writer, move=moves[index], specs=specs, copies=copies)

    largest = max((dist.spec(move.mcore_key).num_bytes for move in moves), default=0)
    num_workers = workers.count(num_workers, num_bytes=num_bytes, largest=largest)
    for index, written in workers.results(open_task, num_tasks=len(moves), num_workers=num_workers):
        for name in written:
            ledger.wrote(name)
            progress.add(specs[name].num_bytes, name=name)
        ledger.read(moves[index].mcore_key)
    ledger.balance()
    writer.close()
    return progress.finish()


def _export_one(
    dist: DistFiles, writer: HfWriter, *, move: Move, specs: Mapping[str, TensorSpec], copies: Mapping[str, str]
) -> list[str]:
    """The names written. In a function of its own, so that the tensor is freed before the next one is read."""
    written = []
    for name, part in zip(move.hf_names, split(dist.read(move.mcore_key), move), strict=True):
        for one in (name, *(copy for copy, original in copies.items() if original == name)):
            writer.write(one, part.to(specs[one].dtype))
            written.append(one)
    return written


def copies_of(table: Table, form: HfForm, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Copy -> original, of what an export of the tensors in `specs` stores a second time."""
    copies = {**table.copies(), **form.copies}
    return {copy: original for copy, original in copies.items() if original in specs and copy not in specs}


def specs_of(files: HfFiles | DistFiles) -> dict[str, TensorSpec]:
    """Dtype and shape of every stored tensor."""
    return {name: files.spec(name) for name in files.tensors}


def export_specs(dist: DistFiles, *, moves: Iterable[Move], dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """Name, dtype and shape of every Hugging Face tensor an export writes."""
    kept = read_form(dist.directory).dtypes
    specs = {}
    for move in moves:
        stored = dist.spec(move.mcore_key).dtype
        for name, shape in zip(move.hf_names, move.hf_shapes, strict=True):
            own = kept.get(name, stored)
            wanted = _wanted(move, dtype) if own.is_floating_point else None
            specs[name] = TensorSpec(wanted or own, shape)
    return specs


def merge(hf: HfFiles, move: Move) -> Tensor:
    """The Megatron tensor of a move, without padding, in the dtype that holds all its parts exactly."""
    parts = [hf.read(name) for name in move.hf_names]
    dtype = _common_dtype(hf, move)
    tensor = move.op.merge([part.to(dtype) for part in parts])
    assert tuple(tensor.shape) == move.shape, (move, tensor.shape)
    return tensor


def split(tensor: Tensor, move: Move) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of a whole, possibly padded Megatron tensor."""
    return move.op.split(tensor[: move.shape[0]] if move.target.padded else tensor)


def pad_rows(tensor: Tensor, move: Move) -> Tensor:
    """Rows of zeros below, up to the model's padded vocabulary."""
    num_rows = move.target.shape[0] - move.shape[0] if move.shape else 0
    return torch.cat([tensor, tensor.new_zeros(num_rows, *move.shape[1:])]) if num_rows else tensor


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def bit_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bytes (so NaN equals itself, and -0.0 does not equal 0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


class Ignored(NamedTuple):
    """Tensors that Ignore rows drop, and those of them that are copies: copy -> original."""

    names: list[str]
    copies: dict[str, str]


def check_ignored(hf: HfFiles, table: Table) -> Ignored:
    """The tensors that Ignore rows drop; those that claim to be a copy must be one."""
    ignored = Ignored([], {})
    for name in hf.tensors:
        row = table.ignored(name)
        if row is None:
            continue
        if row.same_as and not bit_equal(hf.read(name), hf.read(row.same_as)):
            cure = "it has to be a copy" if row.always else "set tie_word_embeddings to false in config.json"
            why = row.reason if row.always else "the config ties them"
            raise ConversionError(f"{hf.tensors[name].file}: {name} differs from {row.same_as}, although {why}; {cure}")
        ignored.names.append(name)
        if row.same_as:
            ignored.copies[name] = row.same_as
    return ignored


def _common_dtype(hf: HfFiles, move: Move) -> torch.dtype:
    dtypes = {hf.spec(name).dtype for name in move.hf_names}
    try:
        return functools.reduce(torch.promote_types, dtypes)
    except RuntimeError as error:
        names = ", ".join(sorted(NAMES[dtype] for dtype in dtypes))
        parts = ", ".join(move.hf_names)
        raise ConversionError(
            f"{hf.directory}: {parts} have different dtypes, {names}; convert them to one dtype"
        ) from error


def _part_dtypes(hf: HfFiles, moves: Iterable[Move]) -> dict[str, torch.dtype]:
    return {
        name: hf.spec(name).dtype
        for move in moves
        for name in move.hf_names
        if hf.spec(name).dtype != _common_dtype(hf, move)
    }
