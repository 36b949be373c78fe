"""The fetched models are the real ones: transformers loads every tensor and they say what they are known to say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.real

ANSWERS = {"minimind2": "The capital of France is Paris.", "smollm2": "The capital of France is Paris."}


def _continue(directory: Path, prompt: str, *, num_tokens: int, chat: bool) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat, return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ANSWERS)
def test_chat_models_answer(name: str, real_model: Callable[[str], Path]):
    answer = _continue(real_model(name), "What is the capital of France?", num_tokens=12, chat=True)
    assert answer.strip().startswith(ANSWERS[name])


def test_stories_tells_a_story(real_model: Callable[[str], Path]):
    story = _continue(real_model("stories15m"), "Once upon a time, there was a little", num_tokens=20, chat=False)
    assert story.lstrip().startswith("girl named L")
