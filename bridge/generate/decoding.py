"""A prompt continued token by token: cached keys and values, greedy or sampled, with the directory's tokenizer."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

# ruff: noqa: E402
from bridge import platform

platform.prepare()  # before megatron-core is imported: on CPU, importing it first costs seconds of compilation

from megatron.core.inference.contexts import StaticInferenceContext

from bridge import api
from bridge.errors import ConfigError, ConversionError
from bridge.generate.options import Options
from bridge.models.gpt import GPT

# Rotary scalings whose angles depend on the length so far: cached keys would carry those of an earlier length.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def continue_text(options: Options) -> str:
    """The prompt and its continuation, or with `chat` the answer alone. Process groups must exist."""
    (model,) = api.load_model(options.path, dtype=options.dtype)
    tokenizer, stop = load_tokenizer(model.assets)
    if options.chat:
        if tokenizer.chat_template is None:
            raise ConfigError(f"chat: the tokenizer in {model.assets} has no chat template; leave chat out")
        messages = [{"role": "user", "content": options.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = tokenizer(options.prompt)["input_ids"]
    new = list(
        continue_ids(
            model,
            prompt,
            max_new_tokens=options.max_new_tokens,
            stop=stop,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
        )
    )
    return str(tokenizer.decode(new if options.chat else prompt + new, skip_special_tokens=True))


def load_tokenizer(directory: Path) -> tuple[Any, frozenset[int]]:
    """transformers' tokenizer and the ids that end a text (generation_config.json, else config.json, else its own).

    Raises ConversionError when it does not load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"path: the tokenizer in {directory} does not load: {str(error).splitlines()[0]}"
        ) from error
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        ends = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if ends is not None:
            return tokenizer, frozenset(ends if isinstance(ends, list) else [ends])
    return tokenizer, frozenset([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


@torch.no_grad()
def continue_ids(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Token ids that follow `prompt`, up to and without one of `stop`, or until the model's max_sequence_length.

    Raises ConfigError when the prompt has no tokens or fills the model's sequence length.
    """
    limit = model.max_sequence_length
    if not 0 < len(prompt) < limit:
        raise ConfigError(f"prompt: has {len(prompt)} tokens; this model continues 1 to {limit - 1}")
    model.eval()
    length = min(limit, len(prompt) + max_new_tokens)
    cache = StaticInferenceContext(1, length) if _can_cache(model) else None
    generator = torch.Generator(platform.device()).manual_seed(seed)
    ids = list(prompt)
    while len(ids) < length:
        token = _choose(_next_logits(model, ids, cache), temperature=temperature, top_k=top_k, generator=generator)
        if token in stop:
            return
        ids.append(token)
        yield token


def _can_cache(model: GPT) -> bool:
    """False where cached keys, or attention to them one query at a time, would not give what a full pass gives."""
    scaling = (model.config.rope_parameters or {}).get("rope_type", "default")
    # Transformer Engine drops the window when it is asked for one query without a mask.
    window_lost = model.config.window_size is not None and model.config.transformer_impl != "local"
    return scaling not in LENGTH_DEPENDENT_ROPE and not window_lost


def _next_logits(model: GPT, ids: Sequence[int], cache: StaticInferenceContext | None) -> torch.Tensor:
    """Logits of the token after `ids`, float32 [true vocabulary]; `cache` holds the keys and values of earlier ones."""
    seen = cache.sequence_len_offset if cache is not None else 0
    tokens = torch.tensor([ids[seen:]], device=platform.device())
    positions = torch.arange(seen, len(ids), device=tokens.device)[None]
    logits = model(tokens, positions, None, inference_context=cache, runtime_gather_output=True)
    if cache is not None:
        cache.sequence_len_offset = len(ids)
    return logits[0, -1, : model.true_vocab_size].float()


def _choose(logits: torch.Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
