"""Dequantised tensors against transformers' own formulas, bit by bit, and everything that must not be cast blindly."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bridge.errors import ConversionError
from bridge.weights import quantized
from bridge.weights.quantized import from_fp8, from_mxfp4, open_source

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8], "activation_scheme": "dynamic", "fmt": "e4m3"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
RANDOM = torch.Generator().manual_seed(0)


def eight(*shape):
    """Random float8 of every exponent, without the two NaN codes."""
    codes = torch.randint(256, shape, generator=RANDOM, dtype=torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)


def codes(*shape):
    return torch.randint(256, shape, generator=RANDOM, dtype=torch.uint8)


def save(directory, tensors, config=None):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return directory


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (3, 8, 16)])
def test_fp8_blocks_are_transformers_own(shape):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    numbers = eight(*shape)
    scales = torch.rand(*shape[:-2], shape[-2] // 4, shape[-1] // 8, generator=RANDOM) * 0.01
    theirs = Fp8Dequantize(None)._dequantize_one(numbers, scales, torch.bfloat16)
    assert same(from_fp8(numbers, scales, block=(4, 8), dtype=torch.bfloat16), theirs)


def test_fp8_blocks_cut_at_the_edges(monkeypatch):
    """As kv_a_proj of DeepSeek-V3: 576 rows in blocks of 128. In steps of one block row, and all at once."""
    numbers, scales = eight(10, 20), torch.rand(3, 3, generator=RANDOM)
    wanted = torch.empty(10, 20)
    for row in range(10):
        for col in range(20):
            wanted[row, col] = numbers[row, col].float() * scales[row // 4, col // 8]
    for rows in (2048, 1):
        monkeypatch.setattr(quantized, "ROWS", rows)
        assert torch.equal(from_fp8(numbers, scales, block=(4, 8), dtype=torch.float32), wanted)


def test_mxfp4_is_transformers_own_for_every_number_and_scale():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    scales = torch.arange(255, dtype=torch.uint8).view(1, 51, 5)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 51, 5, 16, 16)
    for part in range(16):  # each scale with all 256 pairs of numbers
        ours = from_mxfp4(blocks[:, :, :, part].contiguous(), scales, dtype=torch.bfloat16)
        assert same(ours, convert_moe_packed_tensors(blocks[:, :, :, part].contiguous(), scales))


def test_mxfp4_scale_that_is_no_number():
    """E8M0 255 is NaN by the specification."""
    values = from_mxfp4(codes(1, 1, 16), torch.tensor([[255]], dtype=torch.uint8), dtype=torch.bfloat16)
    assert values.shape == (32, 1) and values.isnan().all()


def test_tensors_appear_under_their_plain_names(tmp_path):
    numbers, scales, plain = eight(8, 16), torch.rand(2, 2), torch.ones(3).bfloat16()
    source = save(tmp_path, {"a.weight": numbers, "a.weight_scale_inv": scales, "n.weight": plain}, FP8)
    files = open_source(source)
    assert {name: files.spec(name) for name in files.tensors} == {
        "a.weight": (torch.bfloat16, (8, 16)),
        "n.weight": (torch.bfloat16, (3,)),
    }
    assert same(files.read("n.weight"), plain)
    assert same(files.read("a.weight"), from_fp8(numbers, scales, block=(4, 8), dtype=torch.bfloat16))
    assert open_source(source, dtype=torch.float32).read("a.weight").dtype == torch.float32


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_an_expert_is_read_by_itself(tmp_path, kind, monkeypatch):
    if kind == "fp8":
        tensors, config = {"e": eight(3, 8, 16), "e_scale_inv": torch.rand(3, 2, 2)}, FP8
    else:
        tensors, config = {"e_blocks": codes(3, 6, 2, 16), "e_scales": codes(3, 6, 2) % 200}, MXFP4
    files = open_source(save(tmp_path, tensors, config))
    whole = files.read("e")
    assert files.spec("e") == (whole.dtype, tuple(whole.shape))
    assert whole.shape == ((3, 8, 16) if kind == "fp8" else (3, 64, 6))
    read, asked = type(files.raw).read, []
    monkeypatch.setattr(type(files.raw), "read", lambda self, name: asked.append(name) or read(self, name))
    assert same(files.read("e[1]"), whole[1])
    assert files.spec("e[1]").shape == whole.shape[1:]
    assert all(name.endswith("[1]") for name in asked) and len(asked) == 2


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"a": eight(8, 16)}, None, r"safetensors: a .*looks quantised, but: config.json has no quantization_config"),
        ({"a": eight(8, 16).view(torch.float8_e5m2)}, None, "a .* looks quantised"),
        ({"a_blocks": codes(2, 2, 16), "a_scales": codes(2, 2)}, None, "a_blocks .* looks quantised"),
        ({"a": torch.ones(8, 16), "a_scale_inv": torch.ones(2, 2)}, None, "a_scale_inv .* looks quantised"),
        ({"a": eight(8, 16)}, FP8, "a .*float8_e4m3fn. looks quantised, but: in no pair"),
        ({"a": eight(8, 16), "b": eight(8, 16), "b_scale_inv": torch.ones(2, 2)}, FP8, "a .* but: in no pair"),
        ({"a_scale_inv": torch.ones(2, 2)}, FP8, "a_scale_inv is the scale of a, which is missing"),
        ({"a": torch.ones(8, 16), "a_scale_inv": torch.ones(2, 2)}, FP8, "a is torch.float32 with a scale of"),
        ({"a": eight(8, 16), "a_scale_inv": torch.ones(2, 3)}, FP8, r"a_scale_inv has shape \[2, 3\].* \[2, 2\]"),
        ({"a_blocks": codes(2, 2, 16)}, MXFP4, "a_blocks .* looks quantised"),
        ({"a_scales": codes(2, 2)}, MXFP4, "a_scales is the scale of a_blocks, which is missing"),
        ({"a_blocks": codes(2, 2, 16), "a_scales": codes(2, 3)}, MXFP4, r"a_scales has shape \[2, 3\]"),
        ({"a_blocks": codes(2, 2, 8), "a_scales": codes(2, 2)}, MXFP4, "a_scales has shape"),
        ({"a": eight(8, 16), "a_scale_inv": torch.ones(2, 2)}, MXFP4, "looks quantised"),
    ],
)  # fmt: skip
def test_nothing_is_cast_blindly(tmp_path, tensors, config, message):
    with pytest.raises(ConversionError, match=message):
        open_source(save(tmp_path, tensors, config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method gptq is not supported"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"bits": 4}, "quant_method null"),
        ("fp8", "quant_method fp8"),
        ({"quant_method": "fp8"}, "weight_block_size: null is not two block sizes"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size: "),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme: static"),
        (FP8 | {"fmt": "e5m2"}, "fmt: e5m2"),
        (FP8 | {"kv_cache_scheme": {}}, "kv_cache_scheme: {}"),
        (MXFP4 | {"group_size": 16}, "group_size: 16"),
    ],
)  # fmt: skip
def test_other_quantizations_are_refused_by_name(tmp_path, config, message):
    with pytest.raises(ConversionError, match=f"^config.json: quantization_config.*{message}"):
        open_source(save(tmp_path, {"a": torch.ones(2)}, config))
