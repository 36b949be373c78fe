"""What a dataset trains on, sample by sample and counted, for people who look at it. Imports no torch.

Samples of a store are read from it, however they share rows. Any other dataset's are made of its items, one each.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from bridge.data.blend import Blend
from bridge.data.source import Datasets
from bridge.errors import ConfigError

MOST_STORED = 100_000  # samples of a store whose weights are counted; of more so many, evenly over all
MOST_ITEMS = 500  # the same of items, which cost more
ITEM = ("tokens", "labels", "loss_mask")  # what a sample is made of


class Seen(NamedTuple):
    """One sample. weights: as many as tokens, how much predicting that token counts; nothing predicts the first: 0.

    source: FILE:LINE, or CORPUS:DOCUMENT where it begins, or SET:NUMBER; all count from 1.
    """

    tokens: list[int]
    weights: list[float]
    source: str


class Facts(NamedTuple):
    """A set in numbers. exact: whether all of it was counted, or tokens and shares come from a part of it.

    lengths: int64, tokens of each sample that was counted. trained: share of the tokens. fill: share of the positions
    of all rows that are no padding.
    """

    samples: int
    tokens: int
    lengths: NDArray[numpy.int64]
    trained: float
    fill: float
    exact: bool


def sets(datasets: Datasets) -> dict[str, Any]:
    """`train`, then `eval` or each `eval/NAME`."""
    valid = datasets.valid
    if valid is None:
        return {"train": datasets.train}
    if isinstance(valid, Mapping):
        return {"train": datasets.train, **{f"eval/{name}": dataset for name, dataset in valid.items()}}
    return {"train": datasets.train, "eval": valid}


def samples(dataset: Any, *, name: str) -> Iterator[Seen]:
    """Every sample once, as `dataset` orders them, those of a store as their files do; of a blend's parts one in turn.

    name: of the set. Raises ConfigError for items that do not tell what is trained.
    """
    if isinstance(dataset, Blend):
        yield from _in_turn([samples(part, name=name) for part in dataset.datasets])
    elif _is_stored(dataset):
        limit = dataset.sequence_length + 1  # the last token is only predicted
        for number in dataset.ids:
            sample = dataset.store[int(number)]
            weights = [0.0, *map(_decimal, sample.weights[1:limit])][: len(sample.tokens)]
            yield Seen(sample.tokens[:limit].tolist(), weights, f"{sample.file}:{sample.line}")
    else:
        source_of = getattr(dataset, "source_of", lambda index: f"{name}:{index + 1}")
        for index in range(len(dataset)):
            yield _of_item(dataset[index], source_of(index))


def facts(dataset: Any, *, sequence_length: int) -> Facts:
    """Counts a dataset, or evenly chosen samples of it where there are many."""
    if isinstance(dataset, Blend):
        return _together([facts(part, sequence_length=sequence_length) for part in dataset.datasets])
    number = len(dataset.ids if _is_stored(dataset) else dataset)
    chosen = _evenly(number, MOST_STORED if _is_stored(dataset) else MOST_ITEMS)
    exact = len(chosen) == number
    if not _is_stored(dataset):
        items = [_of_item(dataset[int(index)], "") for index in chosen]
        lengths = numpy.array([len(item.tokens) for item in items], dtype=numpy.int64)
        trained = sum(weight > 0 for item in items for weight in item.weights)
        tokens = round(float(lengths.mean()) * number) if number else 0
        fill = _fill(lengths, sequence_length)
        return Facts(number, tokens, lengths, _share(trained, lengths.sum()), fill, exact)
    limit = dataset.sequence_length + 1
    lengths = numpy.minimum(dataset.store.lengths[dataset.ids], limit)
    trained = sum(int((dataset.store[int(index)].weights[1:limit] > 0).sum()) for index in dataset.ids[chosen])
    fill = getattr(dataset, "fill", 1.0 if dataset.rows == "packed" else _fill(lengths, sequence_length))
    return Facts(number, int(lengths.sum()), lengths, _share(trained, lengths[chosen].sum()), fill, exact)


def _is_stored(dataset: Any) -> bool:
    return hasattr(dataset, "store") and hasattr(dataset, "ids")


def _decimal(weight: Any) -> float:
    """A float32 as people write it: 0.3, not 0.30000001192092896."""
    return float(f"{weight:.7g}")


def _of_item(item: Mapping[str, Any], source: str) -> Seen:
    missing = [key for key in ITEM if key not in item]
    if missing:
        raise ConfigError(
            f"data.source: its items have no {' and no '.join(missing)}, so there is no telling what is trained; give "
            f"them {', '.join(ITEM)}"
        )
    tokens = [*item["tokens"].tolist(), *item["labels"][-1:].tolist()]
    return Seen(tokens, [0.0, *map(_decimal, item["loss_mask"].tolist())], source)


def _in_turn(parts: list[Iterator[Seen]]) -> Iterator[Seen]:
    while parts:
        for part in list(parts):
            try:
                yield next(part)
            except StopIteration:
                parts.remove(part)


def _evenly(number: int, most: int) -> NDArray[numpy.int64]:
    """Up to `most` of the indices below `number`."""
    return numpy.arange(min(number, most), dtype=numpy.int64) * number // max(1, min(number, most))


def _share(part: Any, whole: Any) -> float:
    return float(part) / max(1, int(whole))


def _fill(lengths: NDArray[numpy.int64], sequence_length: int) -> float:
    """With one sample a row: a sample's last token is only predicted."""
    return _share(numpy.maximum(lengths - 1, 0).sum(), len(lengths) * sequence_length)


def _together(parts: list[Facts]) -> Facts:
    """Of the datasets of a blend, each counted once."""
    tokens = [part.tokens for part in parts]
    rows = sum(part.tokens / part.fill for part in parts if part.fill)
    return Facts(
        samples=sum(part.samples for part in parts),
        tokens=sum(tokens),
        lengths=numpy.concatenate([part.lengths for part in parts]),
        trained=sum(part.trained * part.tokens for part in parts) / max(1, sum(tokens)),
        fill=sum(tokens) / max(1, rows),
        exact=all(part.exact for part in parts),
    )
