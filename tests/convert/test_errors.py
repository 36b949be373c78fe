"""Wrong sources and outputs: one line that names the culprit, and nothing is left behind."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.errors import BridgeError, ConfigError, ConversionError
from bridge.weights import locate
from bridge.weights.dist_files import DistWriter, open_dist

LAYER = "model.layers.{}.mlp.up_proj."


def change_weights(source, change):
    stored = load_file(source / "model.safetensors")
    change(stored)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER.format(2)}weight"), "model.layers.2.mlp.up_proj.weight missing"),
        (lambda t: t.update({f"{LAYER.format(4)}weight": torch.zeros(1)}), "layers.4.mlp.up_proj.weight would be lost"),
        (lambda t: t.update({f"{LAYER.format(0)}bias": torch.zeros(88)}), "layers.0.mlp.up_proj.bias would be lost"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(47)}), r"model.norm.weight has shape \[47\]"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(260, 48)}), r"lm_head.weight has shape \[260, 48\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_config(tiny_hf, tmp_path, change, message):
    source = tiny_hf("llama")
    change_weights(source, change)
    with pytest.raises(ConversionError, match=message):
        import_hf(source, tmp_path / "out" / "megatron")
    assert os.listdir(tmp_path / "out") == []


def test_an_output_layer_that_differs_from_the_tied_embedding(tiny_hf, tmp_path):
    source = tiny_hf("llama_tied")
    change_weights(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ConversionError, match="lm_head.weight differs from model.embed_tokens.weight"):
        import_hf(source, tmp_path / "megatron")


def test_a_field_that_may_change_the_logits(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"sliding_window": 5}))
    with pytest.raises(ConversionError, match="sliding_window: 5"):
        import_hf(source, tmp_path / "megatron")


def test_damage_inside_a_checkpoint_leaves_no_export(tiny_hf, tmp_path):
    import_hf(tiny_hf("llama"), tmp_path / "megatron")
    file = locate.locate(tmp_path / "megatron").directory / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ConversionError, match="__0_0.distcp: tensor .* cannot be read"):
        export_hf(tmp_path / "megatron", tmp_path / "out" / "hf")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.final_layernorm.weight"), "decoder.final_layernorm.weight missing"),
        (lambda t: t.update({"adapter.weight": torch.zeros(1)}), "adapter.weight would be lost"),
        (lambda t: t.update({"decoder.final_layernorm.weight": torch.zeros(7)}), r"layernorm.weight has shape \[7\]"),
    ],
)  # fmt: skip
def test_checkpoint_that_does_not_fit_its_model_yaml(tiny_hf, tmp_path, change, message):
    import_hf(tiny_hf("llama"), tmp_path / "megatron")
    directory = locate.locate(tmp_path / "megatron").directory
    dist = open_dist(directory)
    stored = {key: dist.read(key) for key in dist.tensors}
    change(stored)
    with DistWriter(directory) as writer:
        for key, tensor in stored.items():
            writer.write(key, tensor)
    with pytest.raises(ConversionError, match=message):
        export_hf(tmp_path / "megatron", tmp_path / "hf")


def test_paths(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    with pytest.raises(ConversionError, match=r"nowhere/config.json: not found"):
        import_hf(tmp_path / "nowhere", tmp_path / "megatron")
    with pytest.raises(ConfigError, match="^megatron: .* is a Hugging Face directory"):
        export_hf(source, tmp_path / "back")
    import_hf(source, tmp_path / "megatron")
    with pytest.raises(ConversionError, match="^megatron: .* exists; choose another path or set overwrite=true"):
        import_hf(source, tmp_path / "megatron")
    import_hf(source, tmp_path / "megatron", overwrite=True)
    with pytest.raises(BridgeError, match="^hf: .* exists"):
        export_hf(tmp_path / "megatron", source)
    with pytest.raises(ConversionError, match="^max_shard_size: 'big' is not a size"):
        export_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size="big")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf_llama", "megatron"]
