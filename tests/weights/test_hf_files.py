"""Our safetensors streams against the safetensors library and transformers, and damaged files."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.errors import ConversionError
from bridge.weights import hf_headers
from bridge.weights.hf_files import HfWriter, open_hf, parse_size
from bridge.weights.spec import TensorSpec
from tests import hf_models

TENSORS = {
    "a.weight": torch.randn(5, 3),
    "b.weight": torch.randn(4, 4, 2).bfloat16(),
    "c.bias": torch.randn(7).half(),
    "d.scale": torch.tensor(3.5, dtype=torch.float64),
    "e.codes": torch.arange(9, dtype=torch.int8),
    "f.eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "g.empty": torch.empty(0, 3),
    "h.mask": torch.tensor([True, False, True]),
}


def same(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def write(directory, tensors, max_shard_size=10**9):
    directory.mkdir(exist_ok=True)
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = HfWriter(directory, specs, max_shard_size=max_shard_size)
    for name in reversed(tensors):  # any order
        writer.write(name, tensors[name])
    return writer.close()


def test_reads_what_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hf = open_hf(tmp_path)
    assert set(hf.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert same(hf.read(name), tensor)
    assert same(hf.read("a.weight")[1:3], TENSORS["a.weight"][1:3])


def test_the_library_reads_what_we_wrote(tmp_path):
    total = write(tmp_path, TENSORS)
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(TENSORS)
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    assert total == sum(tensor.nbytes for tensor in TENSORS.values())


def test_shards_and_index_are_transformers_own(tmp_path, tiny_hf):
    """Same shard names, same index keys, every shard under the limit."""
    theirs = tiny_hf("llama", max_shard_size="50KB")
    hf = open_hf(theirs)
    ours = tmp_path / "ours"
    total = write(ours, {name: hf.read(name) for name in hf.tensors}, max_shard_size=50_000)
    mine, their_index = (json.loads((path / hf_headers.INDEX).read_text()) for path in (ours, theirs))
    assert set(mine["weight_map"]) == set(their_index["weight_map"])
    assert mine["metadata"]["total_size"] == their_index["metadata"]["total_size"] == total
    files = sorted(path.name for path in ours.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert all(sum(t.nbytes for t in load_file(ours / file).values()) <= 50_000 for file in files)


def test_a_tensor_over_the_limit_gets_its_own_file(tmp_path):
    write(tmp_path, {"small": torch.zeros(2), "big": torch.zeros(100), "last": torch.zeros(2)}, max_shard_size=50)
    assert [len(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))] == [1, 1, 1]


def test_unaligned_data_is_read(tmp_path):
    """Old writers did not pad the header."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    text += b" " * (1 if len(text) % 2 == 0 else 0)
    data = torch.tensor([1.5, -2.5])
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data.numpy().tobytes())
    assert same(open_hf(tmp_path).read("x"), data)


def header_only(tmp_path, entries, payload=b""):
    text = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + payload)


def test_truncated_file_names_file_and_tensor(tmp_path):
    save_file({"first": torch.zeros(4), "last": torch.zeros(1000)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ConversionError, match=r"model.safetensors: truncated inside tensor last \(\d+ of \d+ bytes\)"):
        open_hf(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 20, struct.pack("<Q", 5) + b"{nope", struct.pack("<Q", 2) + b"[]"]
)
def test_not_a_safetensors_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match="model.safetensors: "):
        open_hf(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "tensor x has dtype F4"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "tensor x takes 4 bytes, its shape needs 8"),
        ({"dtype": "F32", "shape": [2]}, "corrupt header of tensor x"),
        ({"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, "corrupt header of tensor x"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "corrupt header of tensor x"),
    ],
)
def test_bad_header_entries(tmp_path, entry, message):
    header_only(tmp_path, {"x": entry}, b"\0" * 8)
    with pytest.raises(ConversionError, match=message):
        open_hf(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header_only(tmp_path, {"x": entry, "y": entry}, b"\0" * 8)
    with pytest.raises(ConversionError, match="overlaps"):
        open_hf(tmp_path)


def test_index_and_files_must_agree(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / hf_headers.INDEX).write_text(
        json.dumps({"weight_map": {"x": "one.safetensors", "y": "one.safetensors"}})
    )
    with pytest.raises(ConversionError, match="one.safetensors: tensor y is not in it"):
        open_hf(tmp_path)
    (tmp_path / hf_headers.INDEX).write_text(json.dumps({"weight_map": {"x": "two.safetensors"}}))
    with pytest.raises(ConversionError, match="two.safetensors: cannot be read"):
        open_hf(tmp_path)
    (tmp_path / hf_headers.INDEX).write_text(json.dumps({"weight_map": {"x": "../one.safetensors"}}))
    with pytest.raises(ConversionError, match="not a file beside it"):
        open_hf(tmp_path)
    (tmp_path / hf_headers.INDEX).write_text("{")
    with pytest.raises(ConversionError, match="not a safetensors index"):
        open_hf(tmp_path)


def test_directories_without_safetensors(tmp_path):
    with pytest.raises(ConversionError, match="no safetensors file"):
        open_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConversionError, match="found pytorch_model.bin; save the model as safetensors"):
        open_hf(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    with pytest.raises(ConversionError, match="no model.safetensors, .*if model.fp16.safetensors is the model"):
        open_hf(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        ConversionError, match=r"3 safetensors files \(a.safetensors, ...\) and no model.safetensors.index.json"
    ):
        open_hf(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), (77, 77), ("12B", 12)],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0", "GB"])
def test_parse_size_refuses(text):
    with pytest.raises(ConversionError, match="max_shard_size: "):
        parse_size(text)


def test_the_file_that_transformers_loads_is_read(tiny_hf, tmp_path):
    """model.safetensors and an older index: transformers takes the first; with the index's files there, say which."""
    from transformers import AutoModelForCausalLM

    old, new = tiny_hf("llama", max_shard_size="60KB", tokenizer=False), tmp_path / "new"
    hf_models.save("llama", new, seed=1, tokenizer=False)
    (new / "model.safetensors").rename(old / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(old).model.norm.weight
    with pytest.raises(ConversionError, match="two models, model.safetensors, which .* with model-00001-of-"):
        open_hf(old)
    shards = sorted(old.glob("model-*.safetensors"))
    for shard in shards:
        shard.rename(tmp_path / shard.name)
    assert torch.equal(open_hf(old).read("model.norm.weight"), theirs)
    (old / "model.safetensors").unlink()
    for shard in shards:
        (tmp_path / shard.name).rename(shard)
    other = AutoModelForCausalLM.from_pretrained(old).model.norm.weight
    assert torch.equal(open_hf(old).read("model.norm.weight"), other) and not torch.equal(other, theirs)
    index = json.loads((old / hf_headers.INDEX).read_text())["weight_map"]
    assert set(hf_headers.tensor_names(old)) == set(index) == set(open_hf(old).tensors)
