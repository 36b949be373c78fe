"""Transformer Engine's attention on samples that share a row (THD): what it computes of the same ones in rows of their
own, within the rounding of bf16."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.parallelism import models
from tests.training.packed_rows import compare_all
from tests.training.test_packed_rows import stored

__all__ = ["stored"]
pytestmark = pytest.mark.gpu

BF16 = {"bf16": True, "params_dtype": "bf16", "pipeline_dtype": "bf16", "grad_reduce_in_fp32": True}
WIDE: dict[str, Any] = {**models.MODEL, "hidden_size": 256, "ffn_hidden_size": 512, "kv_channels": 64}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**WIDE, "init_method_std": 0.02},
    "windowed": {**WIDE, "init_method_std": 0.02, "window_size": [6, 0]},
}


def test_packed_rows_equal_rows_of_their_own(stored: Path, tmp_path: Path):
    (seen,) = run_distributed(compare_all, 1, MODELS, {}, stored, tmp_path, BF16, 0.03, timeout=600)
    assert {name: one.wrong for name, one in seen.items() if one.wrong} == {}
