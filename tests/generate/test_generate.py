"""Greedy text equals transformers', from both kinds of directory, cached and not; mistakes are one line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bridge import api, parallel
from bridge.errors import ConfigError
from bridge.generate import __main__ as generate_main
from bridge.generate import decoding, options

pytestmark = pytest.mark.usefixtures("warm_processes")
PROMPT = [72, 101, 108, 108, 111, 10, 33, 200]


def _greedy_by_transformers(directory: Path, prompt: list[int], *, num_tokens: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def _without_end(ids: list[int], stop: frozenset[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stop else ids


@pytest.mark.parametrize(
    "variant", ["llama", "llama_yarn", "mistral", "qwen2_window", "qwen3_tied", "gemma2", "gemma3"]
)
def test_tiny_models_continue_as_in_transformers(variant: str, tiny_hf: Callable[..., Path]):
    directory = tiny_hf(variant)
    with parallel.single_process():
        (model,) = api.load_model(directory)
        _, stop = decoding.load_tokenizer(model.assets)
        assert decoding._can_cache(model)
        found = list(decoding.continue_ids(model, PROMPT, max_new_tokens=24, stop=stop))
    expected = _greedy_by_transformers(directory, PROMPT, num_tokens=24)
    assert found == _without_end(expected, stop)


@pytest.mark.parametrize(
    "variant", ["llama_all_bias", "granite", "smollm3_yarn", "ernie4_5", "llama_nemotron", "olmoe"]
)
def test_cache_changes_nothing(variant: str, tiny_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    with parallel.single_process():
        (model,) = api.load_model(tiny_hf(variant))
        assert decoding._can_cache(model)
        cached = list(decoding.continue_ids(model, PROMPT, max_new_tokens=40))
        monkeypatch.setattr(decoding, "_can_cache", lambda model: False)
        assert list(decoding.continue_ids(model, PROMPT, max_new_tokens=40)) == cached


def test_stops_at_the_models_length(tiny_hf: Callable[..., Path]):
    with parallel.single_process():
        (model,) = api.load_model(tiny_hf("llama_dynamic"))
        assert len(list(decoding.continue_ids(model, PROMPT, max_new_tokens=1000))) == 64 - len(PROMPT)
        with pytest.raises(ConfigError, match="prompt: has 64 tokens"):
            next(decoding.continue_ids(model, [1] * 64, max_new_tokens=1))


def test_sampling_repeats_with_its_seed(tiny_hf: Callable[..., Path]):
    with parallel.single_process():
        (model,) = api.load_model(tiny_hf("llama"))

        def sample(seed: int, **options: int) -> list[int]:
            return list(decoding.continue_ids(model, PROMPT, max_new_tokens=16, temperature=1.0, seed=seed, **options))

        assert sample(1) == sample(1)
        assert sample(1) != sample(2)
        assert sample(1, top_k=1) == list(decoding.continue_ids(model, PROMPT, max_new_tokens=16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["path=x", "prompt=y", "max_new_token=3"], "did you mean 'max_new_tokens'?"),
        (["path=x", "prompt=y", "max_new_tokens=many"], "max_new_tokens: many"),
        (["path=x", "prompt=y", "temperature=-1"], "temperature: -1 is too small"),
        (["path=x", "prompt=y", "prompt=z"], "prompt: is given twice, the second time as z"),
        (["prompt=y"], "path: is missing"),
        (["path"], "path: not of the form key=value; did you mean 'path'?"),
        (["--temperature", "1"], "--temperature: not of the form key=value; did you mean 'temperature'?"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        options.parse(arguments)
    assert message in str(error.value)


def test_prompt_is_text_whatever_it_looks_like():
    assert options.parse(["path=7", "prompt=a=1"]).prompt == "a=1"
    assert options.parse(["path=7", "prompt=3"]).prompt == "3"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bridge.generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line(tiny_hf: Callable[..., Path]):
    done = _run(f"path={tiny_hf('llama')}", "prompt=Hello", "max_new_tokens=8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello")


def test_a_path_that_will_not_do_is_refused_before_torch(
    tmp_path: Path, tiny_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "bridge.generate.decoding", None)  # its import, with torch's, then raises
    directory = tiny_hf("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    for path, message in [
        (directory, f"{directory} has no tokenizer files; put tokenizer.json there"),
        (tmp_path / "none", "none does not exist; give a Hugging Face directory or a Megatron checkpoint"),
        (tmp_path / "file.txt", "file.txt is a file; give a Hugging Face directory or a Megatron checkpoint"),
        (tmp_path / "empty", "empty is neither a Hugging Face directory (config.json) nor a Megatron checkpoint"),
    ]:
        assert generate_main.main([f"path={path}", "prompt=x"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.startswith("path: ") and message in err


@pytest.mark.real
@pytest.mark.parametrize("name", ["minimind2", "stories15m", "smollm2"])
def test_real_models_continue_as_in_transformers(name: str, real_model: Callable[[str], Path]):
    directory = real_model(name)
    with parallel.single_process():
        (model,) = api.load_model(directory)
        tokenizer, stop = decoding.load_tokenizer(model.assets)
        prompt = tokenizer("Once upon a time, there was a little")["input_ids"]
        found = list(decoding.continue_ids(model, prompt, max_new_tokens=32, stop=stop))
    expected = _greedy_by_transformers(directory, prompt, num_tokens=32)
    assert found == _without_end(expected, stop)


@pytest.mark.real
def test_chat(real_model: Callable[[str], Path]):
    done = _run(f"path={real_model('minimind2')}", "prompt=What is the capital of France?", "chat=true")
    assert "The capital of France is Paris." in done.stdout, done.stderr
