"""Arguments of Megatron-LM are read out of common.pt, and nothing in it is imported or run."""

import argparse
import collections
import enum
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from bridge.errors import ConversionError
from bridge.weights.common_state import megatron_args


class Backend(enum.Enum):
    FLASH = 1


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def save(directory, content):
    torch.save(content, directory / "common.pt")


def test_plain_values_among_foreign_objects(tmp_path):
    arguments = argparse.Namespace(
        num_layers=4,
        norm_epsilon=1e-5,
        swiglu=True,
        normalization="RMSNorm",
        attention_backend=Backend.FLASH,
        params_dtype=torch.bfloat16,
        tensor=torch.ones(3),
        found=collections.defaultdict(list, {1: [2]}),
        path=Path("x"),
        vocab_file=None,
    )
    save(tmp_path, {"args": arguments, "optimizer": {"param_groups": [torch.ones(2)]}, "iteration": 7})
    assert megatron_args(tmp_path) == {
        "num_layers": 4,
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "normalization": "RMSNorm",
    }


def test_without_arguments(tmp_path):
    assert megatron_args(tmp_path) == {}
    for content in ({"iteration": 7}, [1], {"args": {"num_layers": 4}}):
        save(tmp_path, content)
        assert megatron_args(tmp_path) == {}


def test_it_cannot_run_code(tmp_path):
    save(tmp_path, {"args": argparse.Namespace(num_layers=4, other=Attack(tmp_path / "pwned"))})
    assert megatron_args(tmp_path) == {"num_layers": 4}
    assert not (tmp_path / "pwned").exists()
    torch.load(tmp_path / "common.pt", weights_only=False)  # what a plain load of the same file does
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("damage", ["bytes", "no pickle", "cut"])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "common.pt"
    if damage == "bytes":
        file.write_bytes(b"nonsense")
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(*(("x", b"") if damage == "no pickle" else ("c/data.pkl", pickle.dumps([1, 2])[:-3])))
    with pytest.raises(ConversionError, match=r"common.pt: cannot be read \(.*it is damaged"):
        megatron_args(tmp_path)
