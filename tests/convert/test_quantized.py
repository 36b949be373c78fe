"""Quantised directories: imported as what they stand for, verified, exported as bfloat16 without a trace of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge import parallel
from bridge.config.schema import ConvertConfig
from bridge.convert import run
from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.convert.verify import verify
from bridge.errors import ConversionError
from bridge.weights.quantized import open_source

BLOCK = 16
CONFIG = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}


def fp8(tensor):
    """(numbers, scales) of a matrix: each block's largest value becomes 448, the largest number of float8."""
    rows, cols = tensor.shape
    scales = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK))
    numbers = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    for row in range(scales.shape[0]):
        for col in range(scales.shape[1]):
            here = slice(row * BLOCK, (row + 1) * BLOCK), slice(col * BLOCK, (col + 1) * BLOCK)
            scales[row, col] = tensor[here].abs().max().float() / 448
            numbers[here] = (tensor[here].float() / scales[row, col]).to(torch.float8_e4m3fn)
    return numbers, scales


def quantise(source):
    """Make a tiny Llama what DeepSeek stores: linear weights in fp8, embeddings and norms in bf16."""
    stored = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = tensor
        if "_proj.weight" in name:
            stored[name], stored[f"{name}_scale_inv"] = fp8(tensor)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return source


@pytest.fixture
def quantised(tiny_hf):
    """Keys and values have 24 rows, one block and a half."""
    return quantise(tiny_hf("llama", dtype=torch.bfloat16, intermediate_size=96))


def test_import_verify_export(quantised, tmp_path, capsys):
    import_hf(quantised, tmp_path / "megatron")
    settings = ConvertConfig(mode="verify", hf=str(quantised), megatron=str(tmp_path / "megatron"))
    assert run(settings) == 0
    assert "39/39 equal\n" in capsys.readouterr().out
    export_hf(tmp_path / "megatron", tmp_path / "back")
    exported, files = load_file(tmp_path / "back" / "model.safetensors"), open_source(quantised)
    assert exported.keys() == files.tensors.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, files.read(name)), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_transformers_reads_the_quantised_directory_as_we_do(tiny_hf):
    """It dequantises by itself where there is no GPU; blocks cut at an edge it gets wrong, so here there are none."""
    from transformers import AutoModelForCausalLM

    quantised = quantise(tiny_hf("llama", dtype=torch.bfloat16, intermediate_size=96, num_key_value_heads=4))
    theirs = AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.float32).state_dict()
    files = open_source(quantised)
    assert theirs.keys() == files.tensors.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor.bfloat16(), files.read(name)), name


def test_a_dtype_is_dequantised_to_without_a_detour(quantised, tmp_path):
    """fp8 times an fp32 scale has more bits than bf16; verify compares in the dtype that was imported."""
    import_hf(quantised, tmp_path / "megatron", dtype=torch.float32)
    report = verify(quantised, tmp_path / "megatron")
    assert report["passed"] and report["tensors"]["equal"] == 39
    export_hf(tmp_path / "megatron", tmp_path / "back")
    exported = load_file(tmp_path / "back" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exported[name], open_source(quantised, dtype=torch.float32).read(name))
    assert not torch.equal(exported[name], exported[name].bfloat16().float())


def test_a_changed_scale_is_found(quantised, tmp_path):
    import_hf(quantised, tmp_path / "megatron")
    stored = load_file(quantised / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight_scale_inv"][2, 1] *= 2
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    report = verify(quantised, tmp_path / "megatron")
    assert report["tensors"]["different"] == ["model.layers.1.mlp.up_proj.weight"]
    assert not report["passed"]


def test_a_live_model_starts_from_it(quantised):
    import bridge

    with parallel.single_process():
        exported = dict(bridge.export_weights(bridge.load_model(quantised)))
    files = open_source(quantised)
    assert all(torch.equal(tensor, files.read(name)) for name, tensor in exported.items())


def test_without_its_config_nothing_is_imported(quantised, tmp_path):
    config = json.loads((quantised / "config.json").read_text())
    del config["quantization_config"]
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="looks quantised, but: config.json has no quantization_config"):
        import_hf(quantised, tmp_path / "out" / "megatron")
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="quant_method gptq is not supported"):
        import_hf(quantised, tmp_path / "out" / "megatron")
    assert not list((tmp_path / "out").iterdir())


def test_gpt_oss_as_the_hub_has_it(tiny_hf, tmp_path):
    """Experts in MXFP4 blocks: exported as transformers dequantises them, verified with its logits."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = tiny_hf("gpt_oss", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96)
    random = torch.Generator().manual_seed(0)
    stored, wanted = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = wanted[name] = tensor
        if name.endswith("_proj") and "experts" in name:  # [experts, in, out]
            num_experts, width, out = stored.pop(name).shape
            blocks = torch.randint(256, (num_experts, out, width // 32, 16), generator=random, dtype=torch.uint8)
            scales = torch.randint(121, 125, blocks.shape[:-1], generator=random, dtype=torch.uint8)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
            wanted[name] = convert_moe_packed_tensors(blocks, scales)
            assert wanted[name].shape == tensor.shape
    assert len(stored) > len(wanted)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    import_hf(source, tmp_path / "megatron", workers=2)
    assert verify(source, tmp_path / "megatron")["passed"]
    export_hf(tmp_path / "megatron", tmp_path / "back")
    exported = load_file(tmp_path / "back" / "model.safetensors")
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in wanted.items())
