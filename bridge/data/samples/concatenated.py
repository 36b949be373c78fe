"""megatron-core's .bin/.idx files and GPTDataset. Importing this file imports torch and megatron-core."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

from bridge.data.source import Datasets, Prepared, completed
from bridge.errors import ConfigError

PREFIX = "tokens"  # tokens.bin and tokens.idx inside a prepared directory


@dataclass(frozen=True)
class Counts:
    """Sizes of a stored corpus in tokens; entropy in nats per token."""

    train_tokens: int
    heldout_tokens: int
    unigram_entropy: float | None


class _TokenizerFacts:
    """What megatron-core's dataset asks of a tokenizer: its vocabulary size, the end-of-document id, an identity."""

    def __init__(self, *, vocab_size: int, end_of_document: int) -> None:
        self.vocab_size = vocab_size
        self.eod = end_of_document
        self.unique_identifiers = OrderedDict(vocab_size=vocab_size, eod=end_of_document)


def num_train_documents(num_documents: int, *, split: str) -> int:
    """How many of the first documents megatron-core's BlendedMegatronDatasetBuilder gives to the training split."""
    training = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[0]
    return 0 if training is None else round(training[1] * float(num_documents))


def write(directory: Path, documents: Iterable[list[int]], *, vocab_size: int, num_train: int) -> Counts:
    """Store token id lists as `directory`/tokens.{bin,idx}; the first `num_train` documents are for training.

    The unigram entropy is -sum p ln p over the frequencies p of the held-out tokens: no model that ignores context has
    a lower cross-entropy on them.
    """
    prefix = str(directory / PREFIX)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=DType.optimal_dtype(vocab_size))
    train_tokens = 0
    heldout = numpy.zeros(vocab_size, dtype=numpy.int64)
    for number, document in enumerate(documents):
        builder.add_document(document, [len(document)])
        if number < num_train:
            train_tokens += len(document)
        else:
            heldout += numpy.bincount(document, minlength=vocab_size)
    builder.finalize(get_idx_path(prefix))
    total = int(heldout.sum())
    if total == 0:
        return Counts(train_tokens, 0, None)
    share = heldout[heldout > 0] / total
    return Counts(train_tokens, total, float(-(share * numpy.log(share)).sum()))


def index(prepared: Prepared, *, sequence_length: int, split: str, seed: int) -> None:
    """Make megatron-core's sample index files for these settings, before any process group exists.

    megatron-core writes them in place on rank 0 behind a barrier; here they appear by rename, on every node, and the
    later `build` only reads them.
    """
    assert not torch.distributed.is_initialized(), "samples are indexed before process groups exist"
    completed(
        _index_directory(prepared, sequence_length=sequence_length, split=split, seed=seed),
        fill=lambda directory: _build(prepared, sequence_length, split, seed, directory),
    )


def build(prepared: Prepared, *, sequence_length: int, split: str, seed: int) -> Datasets:
    """One epoch of training samples and one of validation samples of the stored corpus."""
    directory = _index_directory(prepared, sequence_length=sequence_length, split=split, seed=seed)
    return _build(prepared, sequence_length, split, seed, directory)


def _index_directory(prepared: Prepared, *, sequence_length: int, split: str, seed: int) -> Path:
    assert prepared.directory is not None
    key = hashlib.sha256(json.dumps([sequence_length, split, seed]).encode()).hexdigest()[:12]
    return prepared.directory / f"samples-{key}"


def _build(prepared: Prepared, sequence_length: int, split: str, seed: int, directory: Path) -> Datasets:
    assert prepared.directory is not None
    manifest = json.loads((prepared.directory / "manifest.json").read_text())
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(prepared.directory / PREFIX)], None),
        split=split,
        path_to_cache=str(directory),
        tokenizer=_TokenizerFacts(vocab_size=manifest["vocab_size"], end_of_document=manifest["end_of_document"]),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        # The core attention is causal by itself; a mask costs 4 x sequence_length^2 bytes per sample.
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config)
    train, valid, _ = builder.build()
    recipe = (prepared, sequence_length, split, seed, directory)
    train, valid = _at_least_one(train, "training", sequence_length), _some(valid)
    return Datasets(Samples(train, "train", recipe), valid and Samples(valid, "valid", recipe))


class Samples:
    """megatron-core's dataset. Pickled, it is what it is made from: its arrays, mapped from files, would be copied."""

    def __init__(self, dataset: Any, part: str, recipe: tuple[Any, ...]) -> None:
        self._dataset, self._part, self._recipe = dataset, part, recipe

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self._dataset[index]
        return item

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (self._part, self._recipe)


def _made_again(part: str, recipe: tuple[Any, ...]) -> Any:
    return getattr(_build(*recipe), part)


def _at_least_one(dataset: Any, part: str, sequence_length: int) -> Any:
    if _some(dataset) is None:
        raise ConfigError(
            f"data.sequence_length: {sequence_length} is longer than the whole {part} text; set a smaller one"
        )
    return dataset


def _some(dataset: Any) -> Any:
    return dataset if dataset is not None and len(dataset) > 0 else None
