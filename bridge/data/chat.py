"""Conversations of your own: files of messages, in the model's chat template. See docs/chat.md."""

from dataclasses import dataclass
from pathlib import Path

from bridge.data import tuning
from bridge.data.encode import chat, conversation
from bridge.data.encode.encoded import Encoded
from bridge.data.encode.masks import Counts
from bridge.data.encode.templates import Template
from bridge.data.readers.reader import Row
from bridge.data.source import Prepared

FINE_TUNES = True


@dataclass(frozen=True)
class Config(tuning.Options):
    """Rows of messages."""

    source: str = "chat"


def check(config: Config) -> None:
    """Raises ConfigError for a path without rows, a malformed first row, or a template that is missing."""
    tuning.check(
        config,
        lambda record: conversation.conversation(record, names=config.names),
        list(conversation.COLUMNS),
    )


def encode(config: Config, row: Row, template: Template, counts: Counts) -> list[Encoded]:
    """From a row to its samples. Raises InvalidRow."""
    talk = conversation.conversation(row.value, names=config.names)
    return chat.encode(talk, template, row=row, rules=config.rules, counts=counts)


def prepare(config: Config, *, cache: Path, seed: int) -> Prepared:
    """The encoded conversations below `cache`, made at first use."""
    return tuning.prepare(config, encode=encode, cache=cache, needs_template=True)


build = tuning.build
