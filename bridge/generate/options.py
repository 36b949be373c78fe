"""The `key=value` words of `python -m bridge.generate`: what there is, what was typed, and whether the path will do."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from bridge.config import sections
from bridge.errors import ConfigError, ConversionError, did_you_mean, shown
from bridge.weights import locate

USAGE = """Continue a prompt with the weights of a Hugging Face directory or a Megatron checkpoint, in one process.

usage: python -m bridge.generate path=DIR prompt=TEXT [key=value ...]
  python -m bridge.generate path=runs/tiny prompt="def main(" max_new_tokens=32
  python -m bridge.generate path=models/chat prompt="What is a lark?" chat=true temperature=0.7 seed=1

Keys and defaults:
"""


def _key(meaning: str, default: Any = dataclasses.MISSING, *, smallest: float | None = None) -> Any:
    return field(default=default, metadata={"help": meaning, "min": smallest})


@dataclass(frozen=True)
class Options:
    """What can be set. Field metadata `help` is the line of --help, `min` the smallest legal value."""

    path: str = _key("Hugging Face directory, run directory, checkpoints directory or one iteration")
    prompt: str = _key("the text to continue")
    max_new_tokens: int = _key("stop after N tokens, if the text has not ended before", 64, smallest=1)
    temperature: float = _key(
        "0: always the most likely token; above 0: sample, more freely the higher it is", 0.0, smallest=0
    )
    top_k: int | None = _key("sample among the N most likely tokens; null: among all", None, smallest=1)
    seed: int = _key("seed of the sampling", 0, smallest=0)
    chat: bool = _key("true: put the prompt into the tokenizer's chat template and print only the answer", False)
    dtype: Literal["fp32", "bf16", "fp16"] | None = _key("fp32, bf16 or fp16; null: as stored", None)


def help_text() -> str:
    """What --help prints."""
    rows = [(_shown(item), item.metadata["help"]) for item in dataclasses.fields(Options)]
    width = max(len(name) for name, _ in rows)
    return USAGE + "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in rows)


def _shown(item: "dataclasses.Field[Any]") -> str:
    if item.default is dataclasses.MISSING:
        return item.name
    return f"{item.name}={yaml.safe_dump(item.default).split()[0]}"


def parse(arguments: Sequence[str]) -> Options:
    """Options from `key=value` words. Raises ConfigError for an unknown key, a wrong type or a missing one."""
    texts = {item.name for item in dataclasses.fields(Options) if item.type is str}
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            names = [item.name for item in dataclasses.fields(Options)]
            raise ConfigError(
                f"{argument}: not of the form key=value"
                f"{did_you_mean(argument.lstrip('-'), names) or '; known keys: ' + ', '.join(names)}"
            )
        if key in values:
            raise ConfigError(f"{key}: is given twice, the second time as {shown(value)}; leave one out")
        values[key] = value if key in texts else _plain(key, value)
    return sections.build(Options, values, "")


def _plain(key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(
            f"{key}: {value!r} is not a plain value; write a number, true, false, null or a word"
        ) from None


def check_directory(path: str) -> None:
    """Raise ConfigError when `path` is not a model directory, ConversionError when it has no tokenizer."""
    directory = Path(path).expanduser().absolute()
    locate.check_model(directory, key="path")
    assets = assets_of(directory)
    if not locate.has_tokenizer(assets):
        raise ConversionError(f"path: {assets} has no tokenizer files; put tokenizer.json there")


def assets_of(directory: Path) -> Path:
    """Where the tokenizer of a model directory lies. Raises ConfigError when `directory` is not a model's."""
    return directory if locate.is_hf(directory) else locate.locate(directory, key="path").root / locate.HF_ASSETS
