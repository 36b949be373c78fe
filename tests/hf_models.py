"""Tiny random Hugging Face models of every family variant, in which a converter bug has nowhere to hide.

Every parameter is re-drawn away from its default (norms away from 1, biases away from 0), eps is large, the vocabulary
is odd, windows and original rope lengths are shorter than `prompts()`; only "dynamic" rope needs a prompt longer than
max_position_embeddings (64) to differ from the default.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests import families


class Variant(NamedTuple):
    """`family` is a file of tests/families; `config` holds what differs from BASE, in HF's own field names."""

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


VARIANTS: dict[str, Variant] = {
    name: Variant(family, fields)
    for family in families.names()
    for name, fields in families.facts(family).VARIANTS.items()
}


def variants(family: str | None = None) -> list[str]:
    """Names of all variants, or of one family's: `@pytest.mark.parametrize("variant", variants("llama"))`."""
    return [name for name, variant in VARIANTS.items() if family in (None, variant.family)]


def config(variant: str, **overrides: Any) -> Any:
    """The transformers config of a variant; `overrides` in HF's field names win."""
    from transformers import AutoConfig

    family, fields = VARIANTS[variant]
    kind = families.get(family, "MODEL_TYPE") or family
    # transformers keeps a field that the class does not have, and passes it on to config.json.
    known = {field.name for field in dataclasses.fields(type(AutoConfig.for_model(kind)))}
    base = {name: value for name, value in BASE.items() if name in known} | families.get(family, "BASE")
    # Deep copy: transformers normalises rope_parameters in place.
    return AutoConfig.for_model(kind, **copy.deepcopy({**base, **fields, **overrides}))


def model(variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """The transformers model of a variant in eval mode, every parameter and stored buffer drawn anew from `seed`."""
    from transformers import AutoModelForCausalLM

    built = AutoModelForCausalLM.from_config(config(variant, **overrides), attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        stored = set(built.state_dict())
        buffers = [(name, buffer) for name, buffer in built.named_buffers() if name in stored]
        for name, parameter in sorted([*built.named_parameters(), *buffers], key=lambda named: named[0]):
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or ".ln_" in name:
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
