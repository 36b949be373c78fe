"""Refuses a torch_dist folder whose pickles would do more than make plain values, before anything else loads them.

Three parts of the format are pickles: `.metadata` (torch reads it with `pickle.load`), `common.pt`, and the objects
between the tensors in the data files (torch loads them with weights_only=False). The first is read here by the
allow-list of `dist_files`, the others by torch's own restricted unpickler with the classes megatron-core declares safe.
Transformer Engine's `_extra_state` is a byte tensor that holds one more pickle.
"""

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from bridge.errors import ConversionError, DamagedError
from bridge.weights.common_state import COMMON, Foreign
from bridge.weights.dist_files import StoredObject, stored_objects

EXTRA_STATE = "_extra_state"
_REFUSED = re.compile(r"(?:GLOBAL|function|class) ([A-Za-z_]\w*(?:\.\w+)+)")
# What Transformer Engine's extra state is made of beside builtin values: (module, name), each a regular expression.
_EXTRA_STATE_CLASSES = (
    (r"torch\._utils", r"_rebuild_tensor_v2|_rebuild_parameter"),
    (r"torch", r"Size|device|\w+Storage|u?int\d+|b?float\d+\w*|bool"),
    (r"torch\.storage", r"UntypedStorage|TypedStorage"),
    (r"torch\.serialization", r"_get_layout"),
    (r"collections", r"OrderedDict|deque"),
    (r"transformer_engine\.common\.recipe", r"_?[A-Z]\w*"),
    (r"megatron\.core\.extensions\.transformer_engine", r"TEDelayedScaling"),
)


def check_plain(directory: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Raise ConversionError, naming the file, if loading the folder could run code; DamagedError if it cannot be read.

    share: (n, of): look at every `of`-th object from the n-th; the ranks of a run share the work.
    """
    first, step = share
    for stored in stored_objects(directory)[first::step]:
        _check_object(stored)
    if first == 0 and (directory / COMMON).is_file():
        _load(directory / COMMON, directory / COMMON, what="it")


def _check_object(stored: StoredObject) -> None:
    try:
        with stored.file.open("rb") as stream:
            stream.seek(stored.offset)
            content = stream.read(stored.length)
    except OSError as error:
        raise DamagedError(f"{stored.file}: cannot be read ({error.strerror})") from error
    value = _load(io.BytesIO(content), stored.file, what=stored.key)
    if EXTRA_STATE in stored.key:
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, torch.Tensor) and part.dtype == torch.uint8 and part.numel():
                _check_extra_state(part.numpy().tobytes(), stored)


def _load(source: Any, file: Path, *, what: str) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := _REFUSED.search(str(error)):
            raise ConversionError(_refusal(file, what, named[1])) from error
        raise DamagedError(f"{file}: {what} is damaged or not a plain value ({_short(error)})") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DamagedError(f"{file}: {what} cannot be read ({_short(error)}); the file is damaged") from error


class _ExtraState(pickle.Unpickler):
    """Looks nothing up: what is allowed becomes an inert Foreign, the rest ends the load."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # it calls torch.load with weights_only=False
            return _load_from_bytes
        if any(re.fullmatch(one, module) and re.fullmatch(two, name) for one, two in _EXTRA_STATE_CLASSES):
            return Foreign
        raise _RefusedError(f"{module}.{name}")


class _RefusedError(Exception):
    pass


def _load_from_bytes(content: bytes) -> Foreign:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = _REFUSED.search(str(error))
        raise _RefusedError(named[1]) if named else error from error
    return Foreign()


def _check_extra_state(content: bytes, stored: StoredObject) -> None:
    try:
        _ExtraState(io.BytesIO(content)).load()
    except _RefusedError as error:
        raise ConversionError(_refusal(stored.file, stored.key, str(error))) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedError(f"{stored.file}: {stored.key} is damaged or not a plain value ({_short(error)})") from error


def _refusal(file: Path, what: str, name: str) -> str:
    return f"{file}: {what} holds {name}, which is not a plain value: loading it could run code; the file is refused"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split(". ")[0].split())[:200] or type(error).__name__
