"""What Megatron-LM's training script says about a model in a checkpoint's `common.pt`: its command line's arguments.

The file is a pickle. Read here are plain values and the attributes of an `argparse.Namespace`; every other class in it
(enums of megatron-core, functions, tensors) becomes an inert Foreign, so nothing is imported and nothing runs.
"""

import argparse
import collections
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bridge.errors import ConversionError

COMMON = "common.pt"
_KNOWN = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class Foreign:
    """Stands for an object whose class is not looked up."""

    def __new__(cls, *_: Any, **__: Any) -> "Foreign":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), Foreign)


def megatron_args(directory: Path) -> dict[str, Any]:
    """The plain values among the arguments Megatron-LM saved in DIRECTORY/common.pt; empty when there are none.

    Raises ConversionError when the file cannot be read.
    """
    file = directory / COMMON
    if not file.is_file():
        return {}
    module = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="inert pickle")
    try:
        common = torch.load(file, map_location="cpu", weights_only=False, pickle_module=module)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{file}: cannot be read ({reason}); it is damaged") from error
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, argparse.Namespace | SimpleNamespace):
        return {}
    return {name: value for name, value in vars(args).items() if isinstance(value, bool | int | float | str)}
