"""megatron-core's GPTDataset over .bin/.idx files. Importing this file imports torch and megatron-core."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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

from bridge.data import blend
from bridge.data.samples import bin_idx
from bridge.data.source import Datasets, Prepared, completed, digest
from bridge.errors import ConfigError

MANIFEST = "manifest.json"  # in a prepared directory: `Mixture` and `Counts`
MOST = 1 << 28  # tokens whose frequencies are counted, of each held-out corpus


@dataclass(frozen=True)
class Mixture:
    """Of what the data of a run consists: prefixes of .bin and .idx files.

    valid: by name the corpora that are for evaluation alone; without one, `split` divides the documents of `train`.
    """

    train: dict[str, float | None]  # and their weights; None: by their length, so that each is read once
    valid: dict[str, list[str]]
    split: str
    vocab_size: int

    @classmethod
    def of(cls, prepared: Prepared) -> "Mixture":
        """What `Prepared.directory` says."""
        assert prepared.directory is not None
        manifest = json.loads((prepared.directory / MANIFEST).read_text())
        return cls(**{name: manifest[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Counts:
    """Sizes of the training and the held-out texts; entropy in nats per token."""

    documents: int
    train_tokens: int
    heldout_tokens: int
    unigram_entropy: float | None


class _TokenizerFacts:
    """What megatron-core's dataset asks of a tokenizer: a vocabulary size, the end-of-document id, an identity."""

    def __init__(self, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod = None  # unused: no mask and no position begins anew after it
        self.unique_identifiers = OrderedDict(vocab_size=vocab_size)


def num_train_documents(num_documents: int, *, split: str) -> int:
    """How many of the first documents megatron-core's BlendedMegatronDatasetBuilder gives to the training split."""
    training = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[0]
    return 0 if training is None else round(training[1] * float(num_documents))


def counts(mixture: Mixture) -> Counts:
    """Counted from the files. Documents for a test, which nothing here uses, are held out, too.

    The unigram entropy is -sum p ln p over the frequencies p of the held-out tokens (the first MOST of each corpus): no
    model that ignores context has a lower cross-entropy on them.
    """
    documents = train_tokens = heldout_tokens = 0
    seen = numpy.zeros(mixture.vocab_size, dtype=numpy.int64)
    heldout: list[tuple[str, bin_idx.Index, int]] = []
    for prefix in mixture.train:
        index = bin_idx.read_index(prefix)
        whole = index.num_documents
        number = whole if mixture.valid else num_train_documents(whole, split=mixture.split)
        documents += whole
        train_tokens += index.tokens_before(number)
        heldout.append((prefix, index, number))
    for prefix in (prefix for prefixes in mixture.valid.values() for prefix in prefixes):
        heldout.append((prefix, bin_idx.read_index(prefix), 0))
    for prefix, index, first in heldout:
        part = slice(first, index.num_documents)
        heldout_tokens += index.tokens_before(part.stop) - index.tokens_before(part.start)
        seen += bin_idx.counts(prefix, index, documents=part, vocab_size=mixture.vocab_size, most=MOST)
    share = seen[seen > 0] / max(1, seen.sum())
    return Counts(
        documents, train_tokens, heldout_tokens, float(-(share * numpy.log(share)).sum()) if len(share) else None
    )


def prepare(
    name: str, mixture: Mixture, *, tokenizer: Path | None, cache: Path, sequence_length: int, seed: int
) -> Prepared:
    """The entry that says of what the data consists, keeps a copy of its tokenizer, and has the samples indexed."""
    from bridge.weights.hf_assets import copy_tokenizer

    def fill(directory: Path) -> None:
        if tokenizer is not None:
            (directory / "tokenizer").mkdir()
            copy_tokenizer(tokenizer, directory / "tokenizer")
        found = counts(mixture)
        (directory / MANIFEST).write_text(json.dumps(asdict(mixture) | asdict(found), indent=2) + "\n")
        sizes = f"{found.train_tokens:,} training and {found.heldout_tokens:,} held-out tokens"
        if found.unigram_entropy is None:
            print(f"data: {sizes}", flush=True)
        else:
            entropy = f"unigram entropy of the held-out part {found.unigram_entropy:.3f} nats per token"
            print(f"data: {sizes}; {entropy}", flush=True)

    identity = [bin_idx.identity(prefix) for prefix in _prefixes(mixture)]
    learned = None if tokenizer is None else (tokenizer / "tokenizer.json").read_text()
    entry = completed(cache / f"{name}-{digest(asdict(mixture), identity, learned)}", fill=fill)
    kept = entry / "tokenizer" if tokenizer is not None else None
    entropy = json.loads((entry / MANIFEST).read_text())["unigram_entropy"]
    prepared = Prepared(entry, mixture.vocab_size, kept, entropy)
    _index(prepared, sequence_length=sequence_length, seed=seed)
    return prepared


def _prefixes(mixture: Mixture) -> Iterable[str]:
    yield from mixture.train
    for prefixes in mixture.valid.values():
        yield from prefixes


def _index(prepared: Prepared, *, sequence_length: int, seed: int) -> None:
    """Make megatron-core's sample index files for these settings, before any process group exists.

    megatron-core writes them in place on rank 0 behind a barrier; here they appear by rename, on every node, and the
    later `build` only reads them.
    """
    assert not torch.distributed.is_initialized(), "samples are indexed before process groups exist"
    completed(
        _index_directory(prepared, sequence_length=sequence_length, seed=seed),
        fill=lambda directory: _build(Mixture.of(prepared), sequence_length, seed, directory),
    )


def build(prepared: Prepared, *, sequence_length: int, seed: int) -> Datasets:
    """One epoch of training samples and one of the samples of each evaluation set."""
    directory = _index_directory(prepared, sequence_length=sequence_length, seed=seed)
    return _build(Mixture.of(prepared), sequence_length, seed, directory)


def _index_directory(prepared: Prepared, *, sequence_length: int, seed: int) -> Path:
    assert prepared.directory is not None
    return prepared.directory / f"samples-{digest(sequence_length, seed)}"


def _build(mixture: Mixture, sequence_length: int, seed: int, directory: Path) -> Datasets:
    made: dict[tuple[str, str], dict[str, Samples | None]] = {}

    def samples(prefix: str, part: str, split: str) -> Samples | None:
        if (prefix, split) not in made:
            made[prefix, split] = _samples(_Recipe(prefix, split, sequence_length, seed, directory, mixture.vocab_size))
        return made[prefix, split][part]

    split = "1,0,0" if mixture.valid else mixture.split
    train = {prefix: samples(prefix, "train", split) for prefix in mixture.train}
    present = {prefix: _at_least_one(found, prefix, mixture, sequence_length) for prefix, found in train.items()}
    if not mixture.valid:
        valid = [samples(prefix, "valid", split) for prefix in mixture.train]
        return Datasets(_blended(present, mixture.train), _joined(valid))
    sets = {name: _joined(samples(prefix, "valid", "0,1,0") for prefix in of) for name, of in mixture.valid.items()}
    for name, found in sets.items():
        if found is None:
            key = blend.eval_key(name)
            raise ConfigError(f"{key}: has fewer tokens than data.sequence_length={sequence_length}; set a smaller one")
    return Datasets(_blended(present, mixture.train), blend.valid(sets))


def _blended(datasets: Mapping[str, Any], weights: Mapping[str, float | None]) -> Any:
    if len(datasets) == 1:
        return next(iter(datasets.values()))
    return blend.Blend(list(datasets.values()), [weights[prefix] or len(found) for prefix, found in datasets.items()])


def _joined(datasets: Iterable[Any]) -> Any:
    found = [dataset for dataset in datasets if dataset is not None]
    if len(found) < 2:
        return found[0] if found else None
    return blend.Blend(found, [len(dataset) for dataset in found])


def _at_least_one(dataset: Any, prefix: str, mixture: Mixture, sequence_length: int) -> Any:
    if dataset is None:
        which = "" if len(mixture.train) == 1 else f" of {prefix}"
        raise ConfigError(
            f"data.sequence_length: {sequence_length} is longer than the whole training text{which}; set a smaller one"
        )
    return dataset


@dataclass(frozen=True)
class _Recipe:
    """What megatron-core's datasets of one corpus are made from."""

    prefix: str
    split: str
    sequence_length: int
    seed: int
    directory: Path
    vocab_size: int


class Samples:
    """megatron-core's dataset. Pickled, it is what it is made from: its arrays, mapped from files, would be copied."""

    def __init__(self, dataset: Any, part: str, recipe: _Recipe) -> None:
        self._dataset, self._part, self._recipe = dataset, part, recipe

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self._dataset[index]
        return item

    def source_of(self, index: int) -> str:
        """PREFIX:NUMBER of the document that a sample begins in, from 1."""
        made = self._dataset
        place, _ = made.sample_index[made.shuffle_index[index]]
        return f"{self._recipe.prefix}:{made.document_index[place] + 1}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (self._part, self._recipe)


def _made_again(part: str, recipe: _Recipe) -> Any:
    return _samples(recipe)[part]


def _samples(recipe: _Recipe) -> dict[str, Samples | None]:
    """One epoch of each part of a corpus; None where it has no whole sample."""
    config = GPTDatasetConfig(
        random_seed=recipe.seed,
        sequence_length=recipe.sequence_length,
        blend=([recipe.prefix], None),
        split=recipe.split,
        path_to_cache=str(recipe.directory),
        tokenizer=_TokenizerFacts(vocab_size=recipe.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        # The core attention is causal by itself; a mask costs 4 x sequence_length^2 bytes per sample.
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config)
    train, valid, _ = builder.build()
    parts = {"train": train, "valid": valid}
    return {
        part: Samples(found, part, recipe) if found is not None and len(found) else None
        for part, found in parts.items()
    }
