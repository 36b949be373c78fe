"""Tiny random Hugging Face models of every family variant, in which a converter bug has nowhere to hide.

Every parameter is re-drawn away from its default (norms away from 1, biases away from 0), eps is large, the vocabulary
is odd, windows and original rope lengths are shorter than `prompts()`; only "dynamic" rope needs a prompt longer than
max_position_embeddings (64) to differ from the default.
"""

import copy
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bridge.models.family import by_name as family_of
from bridge.sources import reference
from tests import families, hf_predictions


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
    from tests.auto import AutoConfig

    family, fields = VARIANTS[variant]
    kind = families.get(family, "MODEL_TYPE") or family
    # transformers keeps a field that the class does not have, and passes it on to config.json.
    known = {field.name for field in dataclasses.fields(type(AutoConfig.for_model(kind)))}
    base = {name: value for name, value in BASE.items() if name in known} | families.get(family, "BASE")
    # Deep copy: transformers normalises rope_parameters in place.
    return AutoConfig.for_model(kind, **copy.deepcopy({**base, **fields, **overrides}))


def model(variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """The transformers model of a variant in eval mode, every parameter and stored buffer drawn anew from `seed`."""
    from tests.auto import AutoModelForCausalLM

    built = AutoModelForCausalLM.from_config(config(variant, **overrides), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        stored = set(built.state_dict())
        buffers = [(name, buffer) for name, buffer in built.named_buffers() if name in stored]
        for name, parameter in sorted([*built.named_parameters(), *buffers], key=lambda named: named[0]):
            draw(name, parameter, generator)
    return built.to(dtype).eval()


def draw(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fill a parameter away from its default."""
    noise = torch.randn(tensor.shape, generator=generator)
    if "norm" in name or ".ln_" in name:  # around 1, or around 0 where the weight is stored less one
        tensor.add_(0.3 * noise)
    elif name.endswith("bias"):
        tensor.copy_(0.3 * noise)
    else:  # a gain over 1 keeps attention and logits far from uniform
        tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)


def save(
    variant: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
    save_original_format: bool = True,
    **overrides: Any,
) -> Path:
    """`model(...)` saved by transformers into `directory`, beside a byte-level tokenizer. Returns `directory`.

    Saved once per process: whoever asks again has a copy.
    """
    key = repr((variant, dtype, seed, tokenizer, max_shard_size, save_original_format, sorted(overrides.items())))
    if key not in _saved:
        folder = tempfile.TemporaryDirectory(prefix="hf_")
        place = Path(folder.name)
        built = model(variant, dtype=dtype, seed=seed, **overrides)
        built.save_pretrained(place, max_shard_size=max_shard_size, save_original_format=save_original_format)
        _complete(variant, place, built.config, seed=seed, max_shard_size=max_shard_size)
        if tokenizer:
            byte_tokenizer().save_pretrained(place)
        _saved[key] = folder
    return shutil.copytree(_saved[key].name, directory, dirs_exist_ok=True)


_saved: dict[str, tempfile.TemporaryDirectory[str]] = {}


def _complete(variant: str, directory: Path, saved_config: Any, *, seed: int, max_shard_size: str) -> None:
    """What transformers does not write: a model_type without a class there, modules of multi-token prediction."""
    own = family_of(VARIANTS[variant].family).model_type
    if own != saved_config.model_type:  # transformers has no class for it but another's
        config_json = directory / "config.json"
        content = json.loads(config_json.read_text())
        config_json.write_text(json.dumps({**content, "model_type": own}))
    if getattr(saved_config, "num_mtp_layers", 0):
        generator = torch.Generator().manual_seed(seed + 1)
        fill = partial(draw, generator=generator)
        hf_predictions.add(directory, saved_config, draw=fill, max_shard_size=max_shard_size)


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
    import tests.auto  # noqa: F401

    model = reference.load(directory)
    for module in model.modules():
        if hasattr(module, "limit"):  # GPT-OSS's experts: transformers 5.17 has 7.0 there, whatever the config says
            module.limit = model.config.swiglu_limit
    with torch.no_grad():
        return model(ids).logits
