"""Options of a conversion that change how it is done, or what is refused, but not what comes out."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.errors import ConversionError
from bridge.weights import locate, transfer
from tests import hf_models
from tests.convert.test_round_trip import assert_same, load_by_mcore, tensors
from tests.distributed import run_distributed


def test_workers_write_the_same_model(tiny_hf, tmp_path):
    """Each has files of its own on import; megatron-core reads them all, at any layout."""
    source = tiny_hf("llama", dtype=torch.bfloat16, max_shard_size="60KB")
    summary = import_hf(source, tmp_path / "megatron", workers=3)
    assert summary.startswith("import: 27 tensors, ")
    directory = locate.locate(tmp_path / "megatron").directory
    assert {file.name for file in directory.glob("*.distcp")} >= {"__1_0.distcp", "__2_0.distcp", "__3_0.distcp"}
    summary = export_hf(tmp_path / "megatron", tmp_path / "back", workers=2, max_shard_size="50KB")
    assert summary.startswith("export: 39 tensors, ")
    assert_same(tensors(tmp_path / "back"), tensors(source))
    ranks = run_distributed(load_by_mcore, 2, tmp_path / "megatron", {"tensor_model_parallel_size": 2})
    assert torch.equal(ranks[0]["decoder.final_layernorm.weight"], tensors(source)["model.norm.weight"].float())


def test_an_error_in_a_worker_is_the_same_line(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.2.mlp.up_proj.weight"][1, 1] = torch.inf
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    for workers in (1, 2):
        with pytest.raises(ConversionError, match="model.safetensors: tensor model.layers.2.mlp.up_proj.weight has 1 "):
            import_hf(source, tmp_path / "out" / "megatron", check_finite=True, workers=workers)
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.self_attn.k_proj.weight"])
def test_check_finite_names_file_and_tensor(tiny_hf, tmp_path, value, name):
    source = tiny_hf("llama", dtype=torch.bfloat16)
    import_hf(source, tmp_path / "megatron", check_finite=True)
    stored = load_file(source / "model.safetensors")
    stored[name].view(-1)[:2] = value
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=rf"model.safetensors: tensor {name} has 2 of \d+ values that are NaN"):
        import_hf(source, tmp_path / "checked", check_finite=True)
    import_hf(source, tmp_path / "unchecked")


@pytest.mark.parametrize(
    ("variant", "num_kept"),
    [("deepseek_v2", 2), ("deepseek_v3", 6), ("glm4_moe", 6), ("ernie4_5_moe", 6), ("llama", 0)],
)
def test_a_cast_leaves_in_fp32_what_transformers_does(tiny_hf, tmp_path, variant, num_kept):
    """By the names in its model class, on import and on export."""
    source = tiny_hf(variant)
    names = getattr(hf_models.model(variant), "_keep_in_fp32_modules_strict", None) or ()
    wanted = {
        name: tensor if any(part in name for part in names) else tensor.bfloat16()
        for name, tensor in tensors(source).items()
    }
    assert sum(tensor.dtype == torch.float32 for tensor in wanted.values()) >= num_kept
    import_hf(source, tmp_path / "half", dtype=torch.bfloat16)
    export_hf(tmp_path / "half", tmp_path / "a")
    import_hf(source, tmp_path / "full")
    export_hf(tmp_path / "full", tmp_path / "b", dtype=torch.bfloat16)
    for name in ("a", "b"):
        assert_same(tensors(tmp_path / name), wanted)
    export_hf(tmp_path / "half", tmp_path / "c", dtype=torch.float32)
    assert_same(tensors(tmp_path / "c"), {name: tensor.float() for name, tensor in wanted.items()})


def test_a_file_that_shrinks_meanwhile_is_named(tiny_hf, tmp_path, monkeypatch):
    source = tiny_hf("llama")
    check = transfer.check_ignored

    def shrinking(*arguments):
        with (source / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)
        return check(*arguments)

    monkeypatch.setattr(transfer, "check_ignored", shrinking)
    with pytest.raises(ConversionError, match="model.safetensors: tensor model.* cannot be read"):
        import_hf(source, tmp_path / "out" / "megatron")
    assert not list((tmp_path / "out").iterdir())
