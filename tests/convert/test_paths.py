"""Paths of a conversion are refused before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from bridge.config.schema import ConvertConfig
from bridge.convert import paths
from bridge.errors import BridgeError
from bridge.weights.pointer import LATEST


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """hf/, a Hugging Face directory; root/run/, a Megatron checkpoint; note.txt; plain/, neither."""
    monkeypatch.chdir(tmp_path)
    iteration = tmp_path / "root" / "run" / "iter_0000000"
    for folder in ("hf", "plain", iteration):
        Path(folder).mkdir(parents=True)
    for file in ("hf/config.json", "plain/x", "note.txt", iteration / ".metadata"):
        Path(file).write_text("{}")
    (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (iteration.parent / LATEST).write_text("0")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mode=import hf=root/run megatron=out", "hf: root/run is a run or a Megatron checkpoint; give a Hugging Face"),
        ("mode=import hf=nowhere megatron=out", "hf: nowhere does not exist"),
        ("mode=import hf=note.txt megatron=out", "hf: note.txt is a file"),
        ("mode=import hf=plain megatron=out", "hf: plain has no config.json"),
        ("mode=import hf=hf megatron=root/run", "megatron: .*root/run exists; choose another path or set overwrite"),
        ("mode=import hf=hf megatron=plain overwrite=", "megatron: .*plain is not a model directory"),
        ("mode=import hf=hf megatron=hf overwrite=", "megatron: .*hf is or contains the input hf"),
        ("mode=export megatron=root/run hf=root overwrite=", "hf: .*root is or contains the input megatron"),
        ("mode=export megatron=hf hf=out", "megatron: .*hf is a Hugging Face directory"),
        ("mode=export megatron=nowhere hf=out", "megatron: .*nowhere is not a directory"),
        ("mode=export megatron=root/run hf=out reference=plain", "reference: plain has no config.json"),
        ("mode=verify megatron=hf hf=hf", "megatron: .*hf is a Hugging Face directory"),
        ("mode=yaml hf=nowhere", "hf: nowhere does not exist"),
        ("mode=import hf=hf megatron=out", None),
        ("mode=export megatron=root/run hf=root/run/export", None),
        ("mode=verify megatron=root/run hf=hf", None),
    ],
)
def test_wrong_paths_are_one_line(places: Path, line: str, message: str | None):
    words = dict(word.split("=") for word in line.split())
    config = ConvertConfig(**{**words, **({"overwrite": True} if "overwrite" in words else {})})
    if message is None:
        paths.check(config)
        return
    with pytest.raises(BridgeError, match=message):
        paths.check(config)


def test_no_torch_is_needed_to_look(places: Path):
    code = "import sys, bridge.convert.paths; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, check=False).returncode == 0
