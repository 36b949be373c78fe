"""Whether weights are numbers: the optional check of an import."""

import torch
from torch import Tensor

from bridge.errors import ConversionError
from bridge.weights.hf_files import HfFiles
from bridge.weights.ledger import Move

BLOCK = 1 << 24  # elements looked at together, so that the check takes no memory worth mentioning


def check_finite(hf: HfFiles, move: Move, merged: Tensor) -> None:
    """Raise ConversionError naming file and tensor of the first NaN or infinity among the parts of `merged`."""
    if is_finite(merged):
        return
    for name in move.hf_names:
        part = hf.read(name)
        if not is_finite(part):
            wrong = int((~torch.isfinite(part.float())).sum())
            raise ConversionError(
                f"{hf.file(name)}: tensor {name} has {wrong} of {part.numel()} values that are NaN or infinite; "
                "set check_finite=false to convert them as they are"
            )


def is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return all(bool(torch.isfinite(block.float()).all()) for block in tensor.reshape(-1).split(BLOCK))
