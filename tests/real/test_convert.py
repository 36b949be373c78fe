"""Real pretrained models: imported, verified against transformers, and exported bit by bit as they came."""

import pytest
import torch
from safetensors.torch import load_file

from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.convert.verify import describe, verify

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["minimind2", "stories15m", "smollm2"])
def test_real_model(name, real_model, tmp_path):
    source = real_model(name)
    print(import_hf(source, tmp_path / "megatron"))
    report = verify(source, tmp_path / "megatron")
    print(describe(report))
    assert report["passed"]
    assert report["logits"]["top1_agreement"] == 1
    print(export_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size="50MB"))
    theirs, ours = (
        {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}
        for path in (source, tmp_path / "back")
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key
