"""What the writer of a checkpoint says about it in `common.pt`, such as Megatron-LM's script its arguments.

The file is torch.save's: a zip archive around a pickle. Read here are plain values and the attributes of an
`argparse.Namespace`; every other class in it (enums of megatron-core, tensors, whatever else) becomes an inert Foreign,
so nothing is imported and nothing can run.
"""

import argparse
import collections
import io
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bridge.errors import DamagedError

COMMON = "common.pt"
_KNOWN = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class Foreign:
    """Stands for an object, class or function that is not looked up; it takes whatever a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> "Foreign":
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> "Foreign":
        return self

    def _take(self, *_: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = _take


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), Foreign)

    def persistent_load(self, _: Any) -> Any:
        return Foreign()


def megatron_args(directory: Path) -> dict[str, Any]:
    """The plain values among the arguments Megatron-LM saved in DIRECTORY/common.pt; empty when there are none.

    Raises ConversionError when the file cannot be read.
    """
    args = read(directory).get("args")
    if not isinstance(args, argparse.Namespace | SimpleNamespace):
        return {}
    return {name: value for name, value in vars(args).items() if isinstance(value, bool | int | float | str)}


def read(directory: Path) -> dict[str, Any]:
    """The contents of DIRECTORY/common.pt; empty when there is none. An object that is not a plain value is a Foreign.

    Raises ConversionError when the file cannot be read.
    """
    file = directory / COMMON
    if not file.is_file():
        return {}
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            common = _Unpickler(io.BytesIO(archive.read(name))).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedError(f"{file}: cannot be read ({type(error).__name__}: {error}); it is damaged") from error
    return common if isinstance(common, dict) else {}
