"""The table of a family: which Hugging Face tensors make which Megatron tensor.

Names have holes, `{layer}`, each standing for one whole dot-separated number, or `[{expert}]` for an entry of a stacked
tensor (`bridge.weights.names`). There are no patterns beyond that: a name either is a row's name with its holes filled,
or it is unknown.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from bridge.weights.ops import Copy, Op


@dataclass(frozen=True)
class Row:
    """One Megatron tensor, by its canonical checkpoint key, and the Hugging Face tensors `op` merges into it.

    With `keep_dtype` no cast to 16 bits touches it: transformers keeps it in fp32 (`_keep_in_fp32_modules_strict`).
    """

    mcore_key: str
    hf_names: tuple[str, ...]
    op: Op
    keep_dtype: bool

    def __init__(
        self, mcore_key: str, hf_names: str | Iterable[str], op: Op | None = None, *, keep_dtype: bool = False
    ) -> None:
        object.__setattr__(self, "mcore_key", mcore_key)
        object.__setattr__(self, "hf_names", (hf_names,) if isinstance(hf_names, str) else tuple(hf_names))
        object.__setattr__(self, "op", op or Copy())
        object.__setattr__(self, "keep_dtype", keep_dtype)
        assert len(self.hf_names) == self.op.num_parts, self
        assert all(_holes(name) == _holes(mcore_key) for name in self.hf_names), self


@dataclass(frozen=True)
class Ignore:
    """A Hugging Face tensor that may be there and is deliberately not converted.

    With `same_as`, it is a copy of that Hugging Face tensor and must equal it bit for bit (a stored tied lm_head); an
    export writes it again if the source had it, or, with `always`, in any case.
    """

    hf_name: str
    reason: str
    same_as: str | None = None
    always: bool = False


class Entry(NamedTuple):
    """A row with its holes filled: concrete names."""

    mcore_key: str
    hf_names: tuple[str, ...]
    op: Op
    keep_dtype: bool


@dataclass(frozen=True)
class Table:
    """Rows with a lookup from either side. Which layers exist is for the caller to say: it asks for the keys it has."""

    rows: tuple[Row | Ignore, ...]
    _by_mcore: "_Index" = field(init=False, repr=False, compare=False)
    _by_hf: "_Index" = field(init=False, repr=False, compare=False)

    def __init__(self, rows: Iterable[Row | Ignore]) -> None:
        object.__setattr__(self, "rows", tuple(rows))
        object.__setattr__(self, "_by_mcore", _Index((row.mcore_key, row) for row in self.rows if isinstance(row, Row)))
        object.__setattr__(self, "_by_hf", _Index((name, row) for row in self.rows for name in _hf_names(row)))

    def entry(self, mcore_key: str) -> Entry | None:
        """The entry that makes this Megatron tensor, or None when no row does."""
        found = self._by_mcore.find(mcore_key)
        return None if found is None else _fill(found.row, found.holes)

    def ignored(self, hf_name: str) -> Ignore | None:
        """The Ignore row for this Hugging Face tensor (holes filled), or None."""
        found = self._by_hf.find(hf_name)
        if found is None or not isinstance(found.row, Ignore):
            return None
        same_as = found.row.same_as and found.row.same_as.format(**found.holes)
        return Ignore(hf_name, found.row.reason, same_as, found.row.always)

    def knows(self, hf_name: str) -> bool:
        """Whether a row is about this Hugging Face tensor, or about its entries."""
        return self._by_hf.find(hf_name) is not None or self._by_hf.find(f"{hf_name}[0]") is not None

    def copies(self) -> dict[str, str]:
        """Copy -> original, of the copies every file of the family holds."""
        return {row.hf_name: row.same_as for row in self.rows if isinstance(row, Ignore) and row.same_as and row.always}


class _Found(NamedTuple):
    row: Row | Ignore
    holes: dict[str, str]


class _Index:
    """Names with holes, found by their skeleton (numbers and holes blanked) and then compared segment by segment."""

    def __init__(self, named: Iterable[tuple[str, Row | Ignore]]) -> None:
        self._rows: dict[tuple[str, ...], list[tuple[list[str], Row | Ignore]]] = {}
        for name, row in named:
            segments = _segments(name)
            same = self._rows.setdefault(_skeleton(segments), [])
            assert all(other != segments for other, _ in same), f"two rows for {name}"
            same.append((segments, row))

    def find(self, name: str) -> _Found | None:
        segments = _segments(name)
        for template, row in self._rows.get(_skeleton(segments), ()):
            pairs = list(zip(template, segments, strict=True))
            if all(want == got or (_is_hole(want) and got.isdigit()) for want, got in pairs):
                return _Found(row, {want[1:-1]: got for want, got in pairs if _is_hole(want)})
        return None


def _is_hole(segment: str) -> bool:
    return segment.startswith("{") and segment.endswith("}")


def _holes(name: str) -> set[str]:
    return {segment[1:-1] for segment in _segments(name) if _is_hole(segment)}


def _segments(name: str) -> list[str]:
    """The dot-separated parts; an index becomes two, so that it equals no plain number: `a.b[3]` -> a, b, [, 3."""
    return name.replace("]", "").replace("[", ".[.").split(".")


def _skeleton(segments: list[str]) -> tuple[str, ...]:
    return tuple("#" if segment.isdigit() or _is_hole(segment) else segment for segment in segments)


def _hf_names(row: Row | Ignore) -> tuple[str, ...]:
    return row.hf_names if isinstance(row, Row) else (row.hf_name,)


def _fill(row: Row | Ignore, holes: dict[str, str]) -> Entry:
    assert isinstance(row, Row)
    names = tuple(name.format(**holes) for name in row.hf_names)
    return Entry(row.mcore_key.format(**holes), names, row.op, row.keep_dtype)
