"""A conversion holds one fused tensor, not the model."""

import os
import subprocess
import sys

import torch

from bridge.weights.hf_files import HfWriter
from bridge.weights.spec import TensorSpec

SCRIPT = """
import resource, sys
from bridge.sources import skeleton
from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.models.hf import config as hf_config
import megatron.core.models.gpt.gpt_model, bridge.weights.transfer
hf, megatron, back = sys.argv[1:]
skeleton.skeleton(hf_config.to_mcore(hf_config.read(hf)))  # what any conversion needs, whatever the model's size
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
import_hf(hf, megatron)
imported = peak()
export_hf(megatron, back)
print(imported - before, peak() - imported)
"""


def test_peak_memory_is_that_of_the_largest_tensor(tmp_path):
    """274 MB of weights, a fused tensor at most 28 MB: three times that while it is merged and written."""
    from tests import hf_models

    size, num_layers = 1536, 4
    config = hf_models.config(
        "llama_tied", hidden_size=size, intermediate_size=size, num_hidden_layers=num_layers, vocab_size=size,
        num_attention_heads=12, num_key_value_heads=12,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "hf")
    square, vector = TensorSpec(torch.float32, (size, size)), TensorSpec(torch.float32, (size,))
    specs = {"model.embed_tokens.weight": square, "model.norm.weight": vector}
    for layer in range(num_layers):
        names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        specs |= {f"model.layers.{layer}.{name}.weight": square for name in names}
        specs |= {f"model.layers.{layer}.{name}_layernorm.weight": vector for name in ("input", "post_attention")}
    writer = HfWriter(tmp_path / "hf", specs, max_shard_size=10**9)
    for name, spec in specs.items():
        writer.write(name, torch.ones(spec.shape, dtype=spec.dtype))
    assert writer.close() > 270e6
    paths = [str(tmp_path / name) for name in ("hf", "megatron", "back")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *paths], stdout=subprocess.PIPE, text=True, check=True
    )
    imported, exported = map(float, done.stdout.split()[-2:])
    assert imported < 100, done.stdout
    assert exported < 100, done.stdout
    assert os.listdir(tmp_path / "back")
