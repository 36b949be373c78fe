"""From the file formats that registries carry to Hugging Face directories: llama2.c, quantised ONNX, GGUF."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

LLAMA2C_MODEL_BYTES = 60816028  # the emscripten image is model.bin, then tokenizer.bin


def build_stories15m(image: Path, out: Path) -> None:
    """llama2.c's float32 export of TinyStories-15M and its tokenizer."""
    data = image.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    values = torch.from_numpy(np.frombuffer(data[28:LLAMA2C_MODEL_BYTES], dtype="<f4").copy())
    head_dim = dim // heads
    per_layer = {  # in the order of llama2.c's export.py, each stacked over layers
        "input_layernorm": (dim,),
        "self_attn.q_proj": (heads * head_dim, dim),
        "self_attn.k_proj": (kv_heads * head_dim, dim),
        "self_attn.v_proj": (kv_heads * head_dim, dim),
        "self_attn.o_proj": (dim, heads * head_dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    rope_table = length * head_dim  # cos and sin, half of it each; not weights
    sizes = [vocab * dim, *(layers * int(np.prod(shape)) for shape in per_layer.values()), dim, rope_table]
    embedding, *stacks, norm, _ = values.split(sizes)
    tensors = {"model.embed_tokens.weight": embedding.view(vocab, dim), "model.norm.weight": norm}
    for (name, shape), stack in zip(per_layer.items(), stacks, strict=True):
        for layer, weight in enumerate(stack.view(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                # llama2.c rotates neighbouring pairs, Hugging Face the two halves of a head.
                weight = weight.view(-1, head_dim // 2, 2, dim).transpose(1, 2).reshape(shape)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _write(out, tensors, config)
    _llama2c_tokenizer(data[LLAMA2C_MODEL_BYTES:]).save_pretrained(out)


def _llama2c_tokenizer(data: bytes) -> Any:
    """tokenizer.bin holds Llama-2's sentencepiece vocabulary: a score, a length and the bytes of every piece."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces: list[str] = []
    scores: list[float] = []
    position = 4  # after the longest piece's length
    while position < len(data):
        score, size = struct.unpack_from("<fi", data, position)
        raw = data[position + 8 : position + 8 + size].decode()
        position += 8 + size
        index = len(pieces)
        if index < 3:
            piece = ("<unk>", "<s>", "</s>")[index]
        else:
            piece = f"<0x{index - 3:02X}>" if index < 259 else raw.replace(" ", "▁")
        pieces.append(piece)
        scores.append(score)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    ranked = []  # sentencepiece merges the pair whose union has the best score; BPE wants that as an ordered list
    for piece in pieces[259:]:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[vocab[piece]], vocab[piece], cut, (left, right)))
    merges = [pair for *_, pair in sorted(ranked)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def build_minimind2(onnx_file: Path, out: Path) -> None:
    """A dynamically quantised ONNX graph (8-bit weights, scale, zero point), hub-style config and tokenizer."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    stored = {entry.name: torch.from_numpy(np.array(numpy_helper.to_array(entry))) for entry in graph.initializer}

    def dequantise(name: str) -> torch.Tensor:
        centred = stored[f"{name}_quantized"].float() - stored[f"{name}_zero_point"].float()
        return centred * stored[f"{name}_scale"].float()

    norms = (name for name in stored if name.startswith("model.") and name.endswith("norm.weight"))
    tensors = {name: stored[name].float() for name in norms}
    # The head was quantised apart from the embedding; the original is tied, so the embedding serves both.
    tensors["model.embed_tokens.weight"] = dequantise("model.embed_tokens.weight")
    for node in graph.node:
        if node.op_type == "MatMulInteger" and "lm_head" not in node.name:
            module = node.name.removesuffix("/MatMul_quant").strip("/").replace("/", ".")
            tensors[f"{module}.weight"] = dequantise(node.input[1].removesuffix("_quantized")).T
    package = onnx_file.parent.parent
    _write(out, tensors, {**json.loads((package / "config.json").read_text()), "dtype": "float32"})
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(package / name, out)


def build_smollm2(gguf_file: Path, out: Path) -> None:
    """A 4-bit GGUF file, dequantised and saved by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = gguf_file.parent, gguf_file.name
    # dequantize: otherwise packed blocks may stay, which save_pretrained refuses.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)


def _write(out: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


BUILDERS: dict[str, Callable[[Path, Path], None]] = {
    "minimind2": build_minimind2,
    "stories15m": build_stories15m,
    "smollm2": build_smollm2,
}
