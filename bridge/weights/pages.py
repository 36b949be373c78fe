"""Tensors in files by their place: mapped, not read, and written in place.

A mapped tensor costs no memory of its own: its pages are the file's, slicing it touches no more than the slice, and
nothing stays resident once the tensor is dropped. Places are absolute, so several threads may share an open file.
"""

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from bridge.weights.spec import TensorSpec

BLOCK = 1 << 26  # bytes per write: Linux takes at most 2 GiB at once


def mapped(file: Path, start: int, spec: TensorSpec) -> Tensor:
    """The tensor at `file[start:]` (private pages: writing to it does not write the file).

    Raises OSError, and ValueError when the file is too short.
    """
    if not spec.num_bytes:
        return torch.empty(spec.shape, dtype=spec.dtype)
    page = start % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as handle:
        pages = mmap.mmap(handle.fileno(), page + spec.num_bytes, access=mmap.ACCESS_COPY, offset=start - page)
    data = torch.frombuffer(pages, dtype=torch.uint8, count=spec.num_bytes, offset=page)
    if start % spec.dtype.itemsize:  # old writers did not align
        data = data.clone()
    return data.view(spec.dtype).view(spec.shape)


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it already is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_at(descriptor: int, data: memoryview, start: int) -> None:
    """Write all of `data` at `start`. Raises OSError."""
    while data:
        num_written = os.pwrite(descriptor, data[:BLOCK], start)
        data, start = data[num_written:], start + num_written
