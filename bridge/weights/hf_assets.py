"""What lies beside the weights of a Hugging Face directory and goes along: configuration, tokenizer, code, licence.

A rule, because a tokenizer or processor may need any file: everything at the top goes that is not weights. No torch.
"""

import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

GENERATION = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"  # goes before one in tokenizer_config.json
# Weights of any program, optimizer states, and pickles, which run code when they are read.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack"),
    *(".npz", ".ot", ".tflite", ".distcp", ".pkl"),
)
WEIGHT_INDEX = "*.index*.json"
TEMPLATES = "additional_chat_templates"  # the folder in which transformers keeps further chat templates
# What belongs to a tokenizer, so that one can replace another.
TOKENIZER = (
    *("tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json", "chat_template*", TEMPLATES),
)
MAX_SIZE = 100_000_000  # bytes; the largest tokenizer files are a third of it


def copy_assets(source: str | Path, target: str | Path) -> None:
    """Copy what goes along into directory `target`, and print what does not: other weights, folders, huge files."""
    source, target = Path(source), Path(target)
    left: list[str] = []
    for path in sorted(source.iterdir()):
        reason = _stays(path)
        if reason is None:
            _copy(path, target / path.name)
        elif reason:
            left.append(f"{path.name} ({reason})")
    if left:
        print(f"{source}: left out: {', '.join(left)}", flush=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Replace the tokenizer in `target` by that of `source`: template, vocabulary and code included."""
    for path in list(_tokenizer_files(target)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in _tokenizer_files(source):
        _copy(path, target / path.name)


def _tokenizer_files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in TOKENIZER) and _stays(path) is None:
            yield path


def _stays(path: Path) -> str | None:
    """Why a file or folder does not go along: "" for the model's own weights and hidden files; None when it goes."""
    if path.name.startswith("."):
        return ""
    if path.is_dir():
        return None if path.name == TEMPLATES or any(path.glob("*.py")) else "a folder"
    if path.name.startswith("model") and ".safetensors" in path.name:
        return ""
    if path.suffix in WEIGHT_SUFFIXES or fnmatch(path.name, WEIGHT_INDEX):
        return "weights"
    if not path.is_file():  # a dangling link, a socket
        return "not a file"
    return "over 100 MB" if path.stat().st_size > MAX_SIZE else None


def _copy(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copyfile(path, target)
