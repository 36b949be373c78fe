"""Which files of a Hugging Face directory are the model, and the names in them. No torch: this describes a model.

A safetensors file is a little-endian u64 header length, a JSON header `{name: {dtype, shape, data_offsets}}` and the
raw bytes (https://github.com/huggingface/safetensors#format).
"""

import json
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bridge.errors import ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses larger headers


def tensor_names(directory: Path) -> Collection[str]:
    """The names that a directory's index or only file says it holds. Raises ConversionError when there is neither."""
    files, listed = chosen(directory)
    return listed or read_header(files[0])[0]


def chosen(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that transformers would load, model.safetensors before the index, and what the index says of them.

    Raises ConversionError when other files beside them may be the ones that are meant.
    """
    single, index = directory / SINGLE, directory / INDEX
    if not index.is_file():
        if not single.is_file():
            raise ConversionError(f"{directory}: {_why_none(directory)}")
        return [single], {}
    listed = _read_index(index)
    files = [directory / name for name in sorted(set(listed.values()))]
    others = [file.name for file in files if file != single and file.is_file()]
    if single.is_file() and others:
        raise ConversionError(
            f"{directory}: holds two models, {SINGLE}, which transformers loads, and {INDEX} with {others[0]}; "
            "remove the one you do not want"
        )
    return ([single], {}) if single.is_file() else (files, listed)


def _why_none(directory: Path) -> str:
    """What to say of a directory in which transformers finds no safetensors files under their usual names."""
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    if len(files) == 1:
        return f"no {SINGLE}, which is what transformers loads; if {files[0]} is the model, give it that name"
    if files:
        return f"{len(files)} safetensors files ({files[0]}, ...) and no {INDEX}; add the index"
    others = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pth") for path in directory.glob(pattern))
    return "no safetensors file" + (f" (found {others[0]}; save the model as safetensors first)" if others else "")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from error
    outside = [file for file in listed.values() if Path(file).name != file]
    if outside:
        raise ConversionError(f"{index}: names {outside[0]!r}, which is not a file beside it")
    return listed


def read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header of a safetensors file without its metadata, the byte behind it, and the size of the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
            if length > min(MAX_HEADER, size - 8):
                raise ConversionError(f"{file}: not a whole safetensors file ({size} bytes); fetch it again")
            header = json.loads(handle.read(length))
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConversionError(f"{file}: corrupt safetensors header ({error}); fetch the file again") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{file}: corrupt safetensors header; fetch the file again")
    header.pop("__metadata__", None)
    return header, 8 + length, size
