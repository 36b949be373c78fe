"""Prompts and answers of your own, in the model's chat template or a written prompt. See docs/chat.md."""

from dataclasses import dataclass
from pathlib import Path

from bridge.data import tuning
from bridge.data.encode import chat, conversation, instruct
from bridge.data.encode.encoded import Encoded
from bridge.data.encode.masks import Counts
from bridge.data.encode.templates import Template
from bridge.data.readers.reader import Row
from bridge.data.source import Prepared

FINE_TUNES = True


@dataclass(frozen=True)
class Config(tuning.Options):
    """Rows of a prompt and its answer. prompt: text before the answer, with columns in {braces}."""

    source: str = "instruct"
    prompt: str | None = None


def check(config: Config) -> None:
    """Raises ConfigError for a path without rows, a malformed first row, or a template that is missing."""
    tuning.check(
        config,
        lambda record: instruct.conversation(record, names=config.names) if config.prompt is None else None,
        [*instruct.COLUMNS, *(name for name in conversation.COLUMNS if name not in instruct.COLUMNS)],
    )


def encode(config: Config, row: Row, template: Template, counts: Counts) -> list[Encoded]:
    """From a row to its samples. Raises InvalidRow."""
    if config.prompt is not None:
        return [instruct.written(row.value, config.prompt, template, names=config.names, row=row)]
    talk = instruct.conversation(row.value, names=config.names)
    return chat.encode(talk, template, row=row, rules=config.rules, counts=counts)


def prepare(config: Config, *, cache: Path, seed: int) -> Prepared:
    """The encoded prompts and answers below `cache`, made at first use."""
    needs = config.prompt is None
    return tuning.prepare(config, encode=encode, cache=cache, needs_template=needs, extra=config.prompt)


build = tuning.build
