"""What a run imports before its first step."""

from pathlib import Path

from tests.launch.commands import TINY, train

SOURCE = """
import atexit, sys
from bridge.data.mock import Config, build, prepare

UNUSED = ("wandb", "tensorboard", "torch._dynamo", "torch._inductor", "transformers", "datasets", "triton", "onnx")
atexit.register(lambda: "torch" in sys.modules and print("imported:", [name for name in UNUSED if name in sys.modules]))
"""


def test_a_run_imports_nothing_that_it_does_not_use(tmp_path: Path):
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "counting.py").write_text(SOURCE)
    code, out, err = train(*TINY, "data.source=corpora.counting", "train.steps=1", "name=one", cwd=tmp_path)
    assert code == 0, err
    assert "imported: []" in out
