"""Tiny random Hugging Face models of every family variant, in which a converter bug has nowhere to hide.

Every parameter is re-drawn away from its default (norms away from 1, biases away from 0), eps is large, the vocabulary
is odd, windows and original rope lengths are shorter than `prompts()`; only "dynamic" rope needs a prompt longer than
max_position_embeddings (64) to differ from the default.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Variant(NamedTuple):
    """`family` is HF's model_type; `config` holds what differs from BASE, in HF's own field names."""

    family: str
    config: Mapping[str, Any]


BASE: dict[str, Any] = {
    "vocab_size": 259,  # 256 bytes and three special tokens: odd, so that every even TP has to pad
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 5e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,  # HF gives the padding row no gradient, megatron does
}

_ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_options": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {  # one factor per rotated pair: head_dim 12
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
}


def _rope(name: str) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": name, "rope_theta": 1234.0, **_ROPE[name]}}


VARIANTS: dict[str, Variant] = {
    "llama": Variant("llama", {}),
    "llama_tied": Variant("llama", {"tie_word_embeddings": True}),
    "llama_mha": Variant("llama", {"num_key_value_heads": 4}),
    "llama_mqa": Variant("llama", {"num_key_value_heads": 1}),
    "llama_attention_bias": Variant("llama", {"attention_bias": True}),
    "llama_mlp_bias": Variant("llama", {"mlp_bias": True}),
    "llama_all_bias": Variant("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": Variant("llama", {"head_dim": 16}),
    "llama_gelu": Variant("llama", {"hidden_act": "gelu"}),
    **{f"llama_{name}": Variant("llama", _rope(name)) for name in _ROPE},
    "mistral": Variant("mistral", {"sliding_window": None}),
    "mistral_window": Variant("mistral", {"sliding_window": 5}),
    "mistral_head_dim": Variant("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": Variant("qwen2", {}),
    "qwen2_tied": Variant("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": Variant("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen2_yarn": Variant("qwen2", _rope("yarn")),
    "qwen3": Variant("qwen3", {"head_dim": 16}),
    "qwen3_tied": Variant("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_attention_bias": Variant("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3_window": Variant(
        "qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    ),
}


def variants(family: str | None = None) -> list[str]:
    """Names of all variants, or of one family's: `@pytest.mark.parametrize("variant", variants("llama"))`."""
    return [name for name, variant in VARIANTS.items() if family in (None, variant.family)]


def config(variant: str, **overrides: Any) -> Any:
    """The transformers config of a variant; `overrides` in HF's field names win."""
    from transformers import AutoConfig

    family, fields = VARIANTS[variant]
    # Deep copy: transformers normalises rope_parameters in place.
    return AutoConfig.for_model(family, **copy.deepcopy({**BASE, **fields, **overrides}))


def model(variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """The transformers model of a variant in eval mode, every parameter drawn anew from `seed`."""
    from transformers import AutoModelForCausalLM

    built = AutoModelForCausalLM.from_config(config(variant, **overrides), attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(built.named_parameters()):
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * draw)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * draw)
            else:  # a gain over 1 keeps attention and logits far from uniform
                parameter.copy_(1.5 * draw / parameter.shape[-1] ** 0.5)
    return built.to(dtype).eval()


def save(
    variant: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """`model(...)` saved by transformers into `directory`, beside a byte-level tokenizer. Returns `directory`."""
    built = model(variant, dtype=dtype, seed=seed, **overrides)
    built.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer() -> Any:
    """A fast tokenizer over the 256 bytes, then <s> (256), </s> (257) and <pad> (258): BASE's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def prompts(*, batch: int = 2, length: int = 24, vocab_size: int = BASE["vocab_size"], seed: int = 1) -> torch.Tensor:
    """Fixed random token ids, int64 [batch, length]."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers answers for `ids` in float32: [batch, length, vocab]."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        return loaded.eval()(ids).logits
