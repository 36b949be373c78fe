"""Several data sets read as one, in the shares that data.path gives. Imports no torch."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from bridge.data.source import digest
from bridge.errors import ConfigError, shown

Path = str | list[str]


def weighted(path: Path | Mapping[str, float]) -> list[tuple[Path, float]]:
    """data.path as (path, weight): {path: weight, ...}, or one path or list of paths, which is one data set."""
    if not isinstance(path, Mapping):
        return [(path, 1.0)]
    for name, weight in path.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ConfigError(f"data.path: {name} has the weight {shown(weight)}; set a number above 0")
    return list(path.items()) or [([], 1.0)]


def evaluated(path: Path | Mapping[str, Path] | None) -> dict[str, Path]:
    """data.eval as {name: path}; the name of one that has none is empty."""
    if path is None:
        return {}
    return {str(name): named for name, named in path.items()} if isinstance(path, Mapping) else {"": path}


def eval_key(name: str) -> str:
    """The key of the set `name` of `evaluated`."""
    return f"data.eval.{name}" if name else "data.eval"


def valid(sets: Mapping[str, Any]) -> Any:
    """`Datasets.valid` of the data sets of `evaluated`: one that has no name is no mapping."""
    return sets[""] if list(sets) == [""] else sets


def title(path: Path) -> str:
    """For people: the first of the paths, and how many more there are."""
    paths = [path] if isinstance(path, str) else path
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


class Blend:
    """A data set of some others: in one epoch each of them has its share, and none is left unread.

    So the one that is largest for its weight is read once, and the others again and again. Which sample comes when is
    the sampler's.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float]) -> None:
        assert datasets and len(datasets) == len(weights)
        epoch = max(len(dataset) / weight for dataset, weight in zip(datasets, weights, strict=True))
        self.datasets = list(datasets)
        pairs = zip(datasets, weights, strict=True)
        self.counts = [max(len(dataset), round(weight * epoch)) for dataset, weight in pairs]
        self.ends = list(accumulate(self.counts))
        if hasattr(datasets[0], "collate"):
            self.collate = datasets[0].collate
        if hasattr(datasets[0], "rows"):
            self.rows = datasets[0].rows
        if hasattr(datasets[0], "identity"):
            self.identity = digest(self.counts, [dataset.identity for dataset in datasets])

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        dataset = self.datasets[number]
        return dataset[(index - self.ends[number] + self.counts[number]) % len(dataset)]
