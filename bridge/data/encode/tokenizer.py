"""Byte-level BPE tokenizers: trained on a corpus or read from a Hugging Face directory. Imports no torch."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from bridge.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"


class TextTokenizer(NamedTuple):
    """A tokenizer and the id that ends a document."""

    tokenizer: tokenizers.Tokenizer
    end_of_document: int

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: what an embedding needs."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """Token ids of each document, ended by the end-of-document token; no other special token is added."""
        encodings = self.tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)  # without offsets
        return [[*encoding.ids, self.end_of_document] for encoding in encodings]


def train(documents: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of `vocab_size` ids (fewer when the text is too small) learned from `documents`.

    The same documents in the same order give the same tokenizer.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    one_by_one = (document for document in documents)  # so that a signal is answered between two, not after all
    tokenizer.train_from_iterator(one_by_one, trainer=trainer)
    return TextTokenizer(tokenizer, tokenizer.get_vocab()[END_OF_DOCUMENT])


def save(tokenizer: TextTokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: AutoTokenizer.from_pretrained(directory) gives the same ids."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load(directory: Path, *, end_of_document: str | None = None) -> TextTokenizer:
    """The tokenizer of a Hugging Face directory; `end_of_document`, else its eos_token, ends a document."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file_of(directory)))
    if end_of_document is not None:
        given = tokenizer.token_to_id(end_of_document)
        if given is None:
            raise ConfigError(
                f"data.end_of_document: {end_of_document!r} is no token of {directory}; set one that is, or null for "
                "its eos_token"
            )
        return TextTokenizer(tokenizer, given)
    settings_file = directory / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    end = settings.get("eos_token")
    end = end["content"] if isinstance(end, dict) else end
    end_id = None if end is None else tokenizer.token_to_id(end)
    if end_id is None:
        raise ConfigError(
            f"data.tokenizer: {directory}/tokenizer_config.json has no eos_token that is in its vocabulary (found "
            f"{end!r}); add one: it ends each document"
        )
    return TextTokenizer(tokenizer, end_id)


def file_of(directory: Path) -> Path:
    """The tokenizer.json of a Hugging Face directory. Raises ConfigError when there is none."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        fault = (
            "has no tokenizer.json" if directory.is_dir() else "is a file" if directory.exists() else "does not exist"
        )
        raise ConfigError(f"data.tokenizer: {directory} {fault}; name a Hugging Face tokenizer directory")
    return file
