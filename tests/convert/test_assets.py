"""What lies beside the weights comes along, by the rule of bridge/weights/hf_assets.py, and still works."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge.convert.export import export_hf
from bridge.convert.import_ import import_hf
from bridge.weights import hf_assets
from tests import hf_models

# A tokenizer with code and a vocabulary file of its own, as Moonlight and Kimi-K2 have; a character is a token.
CODE = """
from pathlib import Path

from transformers import PreTrainedTokenizer

from .tokenization_parts import split


class LetterTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}

    def __init__(self, vocab_file, **options):
        self.letters = Path(vocab_file).read_text().split()
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: number for number, letter in enumerate(self.letters)}

    def _tokenize(self, text):
        return split(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, number):
        return self.letters[number]
"""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def with_own_tokenizer(source: Path) -> Path:
    """The directory, with a tokenizer of its own code, files that a rule leaves out, and one no list would know."""
    (source / "tokenization_letters.py").write_text(CODE)
    (source / "tokenization_parts.py").write_text("def split(text):\n    return list(text)\n")
    (source / "tiktoken.model").write_text(" ".join("abcdefgh"))
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_letters.LetterTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("preprocessor_config.json", "params.json", "LICENSE", ".gitattributes", "pytorch_model.bin"):
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    for folder, name in (("onnx", "model.onnx"), (hf_assets.TEMPLATES, "tool_use.jinja"), ("package", "code.py")):
        (source / folder).mkdir()
        (source / folder / name).write_text(TEMPLATE)
    return source


def test_a_tokenizer_with_code_of_its_own_survives(tiny_hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = with_own_tokenizer(tiny_hf("deepseek_v3", tokenizer=False))
    expected = AutoTokenizer.from_pretrained(source, trust_remote_code=True)("hagebach")["input_ids"]
    import_hf(source, tmp_path / "megatron")
    assert "left out: onnx (a folder), pytorch_model.bin (weights)\n" in capsys.readouterr().out
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert "left out" not in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back", trust_remote_code=True)
    assert tokenizer("hagebach")["input_ids"] == expected == [7, 0, 6, 4, 1, 0, 2, 7]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    left = {"onnx", "pytorch_model.bin", ".gitattributes"}
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in source.iterdir()} - left


def test_one_tokenizer_replaces_another_with_all_that_belongs_to_it(tiny_hf, tmp_path: Path):
    """As when a run has data.tokenizer and init.path: no part of the old one is left to be loaded."""
    source, other = with_own_tokenizer(tiny_hf("llama", tokenizer=False)), tmp_path / "other"
    assets = tmp_path / "assets"
    assets.mkdir()
    hf_assets.copy_assets(source, assets)
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    (other / "model.safetensors").write_text("")
    hf_assets.copy_tokenizer(other, assets)
    kept = {"config.json", "generation_config.json", "preprocessor_config.json", "params.json", "LICENSE", "package"}
    assert {path.name for path in assets.iterdir()} == kept | {"tokenizer.json"}


def test_generate_stops_at_the_end_token_of_a_model_trained_from_scratch(tiny_hf, tmp_path: Path):
    """Such a checkpoint carries a tokenizer and no config; here the token that the model answers ends the text."""
    source, prompt = tiny_hf("llama"), hf_models.prompts(batch=1, length=8)
    answer = AutoModelForCausalLM.from_pretrained(source).generate(prompt, max_new_tokens=1, do_sample=False)[0, -1]
    import_hf(source, tmp_path / "megatron")
    assets = tmp_path / "megatron" / "hf"
    for name in ("config.json", hf_assets.GENERATION):
        (assets / name).unlink()
    settings = json.loads((assets / "tokenizer_config.json").read_text())
    token = AutoTokenizer.from_pretrained(source).convert_ids_to_tokens(int(answer))
    (assets / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": token}))
    export_hf(tmp_path / "megatron", tmp_path / "back")
    ids = json.loads((tmp_path / "back" / hf_assets.GENERATION).read_text())
    assert ids == {"bos_token_id": 256, "eos_token_id": int(answer), "pad_token_id": 258}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.config.eos_token_id == int(answer)
    assert model.generate(prompt, max_new_tokens=6, do_sample=False).shape == (1, 9)
