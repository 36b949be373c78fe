"""How a Hugging Face source wrote its tensors, kept beside an imported checkpoint so that an export gives it back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from bridge.weights.hf_files import DTYPES, NAMES

HF_FORM = "hf_form.json"


class HfForm(NamedTuple):
    """`spelling`: which of its family's ways to name tensors (`Family.spellings`), "" the usual one. `dtypes`: of the
    tensors that were fused with others of another dtype. `copies`: tensors stored twice, copy -> original."""

    spelling: str = ""
    dtypes: Mapping[str, torch.dtype] = {}
    copies: Mapping[str, str] = {}


def write_form(directory: Path, form: HfForm) -> None:
    """Write the form beside the tensors in `directory`, unless it is the usual one."""
    if form != HfForm():
        plain = form._asdict() | {"dtypes": {name: NAMES[dtype] for name, dtype in form.dtypes.items()}}
        (directory / HF_FORM).write_text(json.dumps(plain, indent=1), encoding="utf-8")


def read_form(directory: Path) -> HfForm:
    """The form beside the tensors in `directory`; the usual one when there is none."""
    file = directory / HF_FORM
    if not file.is_file():
        return HfForm()
    plain = json.loads(file.read_text(encoding="utf-8"))
    return HfForm(**plain | {"dtypes": {name: DTYPES[dtype] for name, dtype in plain["dtypes"].items()}})
