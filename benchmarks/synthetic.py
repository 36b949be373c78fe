"""A Llama checkpoint of any size with real bytes on disk: what conversion has to move, without a download."""

import json
import math
from pathlib import Path

import torch

from bridge.weights.hf_files import HfWriter
from bridge.weights.spec import TensorSpec

FULL_SIZE = 16_060_522_496  # bytes of Llama-3.1-8B in bf16
FULL_WIDTH, FULL_VOCAB, NUM_LAYERS, KV_CHANNELS, NUM_GROUPS = 4096, 128_256, 32, 128, 8
BLOCK = 1 << 24  # random elements, repeated


def config(num_bytes: int) -> dict[str, object]:
    """config.json of a model of about `num_bytes`: that of Llama-3.1-8B, made narrower in every direction."""
    width = max(round(FULL_WIDTH * math.sqrt(num_bytes / FULL_SIZE) / KV_CHANNELS), 1) * KV_CHANNELS
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": width,
        "intermediate_size": 7 * width // 2,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": width // KV_CHANNELS,
        "num_key_value_heads": math.gcd(width // KV_CHANNELS, NUM_GROUPS),
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": FULL_VOCAB * width // FULL_WIDTH,
    }


def write(directory: Path, *, num_bytes: int, max_shard_size: int = 5 * 10**9) -> int:
    """Write the checkpoint; the bytes of its tensors."""
    directory.mkdir(parents=True)
    fields = config(num_bytes)
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in _shapes(fields).items()}
    writer = HfWriter(directory, specs, max_shard_size=max_shard_size)
    largest = max(math.prod(spec.shape) for spec in specs.values())
    block = torch.randn(min(BLOCK, largest), generator=torch.Generator().manual_seed(0)).bfloat16()
    values = block.repeat(-(-largest // block.numel()))
    for name, spec in specs.items():
        writer.write(name, values[: math.prod(spec.shape)].view(spec.shape))
    return writer.close()


def _shapes(fields: dict[str, object]) -> dict[str, tuple[int, ...]]:
    width, wide, vocab = (int(str(fields[name])) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    groups = int(str(fields["num_key_value_heads"])) * KV_CHANNELS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}mlp.down_proj.weight": (width, wide),
            f"{prefix}mlp.gate_proj.weight": (wide, width),
            f"{prefix}mlp.up_proj.weight": (wide, width),
            f"{prefix}post_attention_layernorm.weight": (width,),
            f"{prefix}self_attn.k_proj.weight": (groups, width),
            f"{prefix}self_attn.o_proj.weight": (width, width),
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}self_attn.v_proj.weight": (groups, width),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
