"""Hugging Face model directories as streams of tensors: where each lies, lazy reads, sharded writes."""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.errors import ConversionError
from bridge.weights import names, pages
from bridge.weights.hf_headers import INDEX, SINGLE, chosen, read_header
from bridge.weights.spec import TensorSpec

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HfTensor(NamedTuple):
    """Where a tensor's bytes lie: `file[start:start + spec.num_bytes]`."""

    spec: TensorSpec
    file: Path
    start: int


@dataclass(frozen=True)
class HfFiles:
    """The tensors of one directory, by Hugging Face name, in the order of the files."""

    directory: Path
    tensors: Mapping[str, HfTensor]

    def spec(self, name: str) -> TensorSpec:
        return self._stored(name).spec

    def file(self, name: str) -> Path:
        """The file that holds a tensor or entry."""
        return self._stored(name).file

    def _stored(self, name: str) -> HfTensor:
        """Where a tensor, or an entry `name[3]` of a stacked one, lies."""
        base, index = names.split_index(name)
        stored = self.tensors[base]
        for number in index:
            spec = TensorSpec(stored.spec.dtype, stored.spec.shape[1:])
            stored = HfTensor(spec, stored.file, stored.start + number * spec.num_bytes)
        return stored

    def read(self, name: str) -> Tensor:
        """The tensor or entry, mapped from its file (private pages: writing to it does not write the file).

        Raises ConversionError naming file and tensor.
        """
        spec, file, start = self._stored(name)
        try:
            return pages.mapped(file, start, spec)
        except (OSError, ValueError) as error:  # it was there when the headers were read
            raise ConversionError(f"{file}: tensor {name} cannot be read ({error}); fetch the file again") from error


def open_hf(directory: str | Path) -> HfFiles:
    """Read the headers of a directory's safetensors files.

    Raises ConversionError, naming file and tensor, when files are missing, truncated, corrupt or not as the index says.
    """
    directory = Path(directory)
    files, listed = chosen(directory)
    tensors: dict[str, HfTensor] = {}
    for file in files:
        for name, stored in _places(file).items():
            if name in tensors:
                raise ConversionError(f"{file}: tensor {name} is also in {tensors[name].file.name}; keep one of them")
            tensors[name] = stored
    for name, file_name in listed.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ConversionError(f"{directory / file_name}: tensor {name} is not in it, although {INDEX} says so")
    return HfFiles(directory, tensors)


def main_dtype(specs: Iterable[TensorSpec]) -> torch.dtype:
    """The dtype that most bytes have."""
    num_bytes: Counter[torch.dtype] = Counter()
    for spec in specs:
        num_bytes[spec.dtype] += spec.num_bytes
    return num_bytes.most_common(1)[0][0]


def parse_size(text: str | int, *, key: str = "max_shard_size") -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number, as Hugging Face counts them (GB = 10**9)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(text).upper())
    size = 0
    if found:
        base = 1024 if found[3] else 1000
        size = int(float(found[1]) * base ** " KMGT".index(found[2] or " "))
    if size <= 0:
        raise ConversionError(f"{key}: {text!r} is not a size; write it like 5GB or 500MB")
    return size


class HfWriter:
    """Writes named tensors of known dtypes and shapes, in any order, into files of at most `max_shard_size` bytes.

    Entries of a stacked tensor (`name[3]`) are written one by one. A tensor larger than that gets a file of its own.
    Files and index are named as transformers names them. The files are complete once every tensor was written and
    `close()` returned the total number of bytes.
    """

    def __init__(self, directory: str | Path, tensors: Mapping[str, TensorSpec], *, max_shard_size: int) -> None:
        self._directory = Path(directory)
        self._missing = set(tensors)
        tensors = names.stack(tensors)
        shards = _plan_shards(tensors, max_shard_size)
        self._files: dict[Path, FileIO] = {}
        self._places: dict[str, HfTensor] = {}
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start_file(self._directory / file, {name: tensors[name] for name in shard})

    def _start_file(self, file: Path, tensors: Mapping[str, TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in tensors.items():
            header[name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.num_bytes],
            }
            self._places[name] = HfTensor(spec, file, end)
            end += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in tensors:
            self._places[name] = self._places[name]._replace(start=8 + len(text) + self._places[name].start)
        file.unlink(missing_ok=True)  # a file someone has mapped must not shrink
        self._files[file] = file.open("wb", buffering=0)
        pages.write_at(self._files[file].fileno(), memoryview(struct.pack("<Q", len(text)) + text), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its dtype and shape must be the ones promised. Threads may share the work.

        Raises ConversionError naming file and tensor when the disk does not take it.
        """
        base, index = names.split_index(name)
        whole, file, start = self._places[base]
        spec = TensorSpec(whole.dtype, whole.shape[len(index) :])
        assert (tensor.dtype, tuple(tensor.shape)) == spec, (name, tensor.dtype, tensor.shape, spec)
        self._missing.remove(name)
        try:
            begin = start + (index[0] * spec.num_bytes if index else 0)
            pages.write_at(self._files[file].fileno(), pages.data_of(tensor), begin)
        except OSError as error:
            raise ConversionError(f"{file}: tensor {name} cannot be written ({error.strerror})") from error

    def close(self) -> int:
        """Finish the files and the index; the bytes of all tensors."""
        assert not self._missing, self._missing
        for handle in self._files.values():
            handle.close()
        total = sum(place.spec.num_bytes for place in self._places.values())
        if len(self._files) > 1:
            weight_map = {name: self._places[name].file.name for name in sorted(self._places)}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return total


def _plan_shards(tensors: Mapping[str, TensorSpec], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in tensors.items():
        if shards[-1] and size + spec.num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    return shards


def _places(file: Path) -> dict[str, HfTensor]:
    header, first, size = read_header(file)
    tensors: dict[str, HfTensor] = {}
    for name, entry in header.items():
        try:
            dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConversionError(f"{file}: corrupt header of tensor {name}; fetch the file again") from error
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
            raise ConversionError(f"{file}: corrupt header of tensor {name}; fetch the file again")
        if dtype_name not in DTYPES:
            raise ConversionError(f"{file}: tensor {name} has dtype {dtype_name}, which is not supported")
        spec = TensorSpec(DTYPES[str(dtype_name)], shape)
        if end - begin != spec.num_bytes:
            raise ConversionError(f"{file}: tensor {name} takes {end - begin} bytes, its shape needs {spec.num_bytes}")
        if first + end > size:
            have = f"{size} of {first + end} bytes"
            raise ConversionError(f"{file}: truncated inside tensor {name} ({have}); fetch it again")
        tensors[name] = HfTensor(spec, file, first + begin)
    _check_no_overlap(file, tensors)
    return tensors


def _check_no_overlap(file: Path, tensors: Mapping[str, HfTensor]) -> None:
    placed: Iterable[tuple[str, HfTensor]] = sorted(tensors.items(), key=lambda item: item[1].start)
    end = 0
    for name, stored in placed:
        if stored.start < end:
            raise ConversionError(f"{file}: tensor {name} overlaps the one before it; the file is corrupt")
        end = stored.start + stored.spec.num_bytes
