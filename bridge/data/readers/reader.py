"""What a reader gives."""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One document or record of a file."""

    value: Any
    """Its text, or the record as a dict."""
    file: str
    line: int
    """Where it begins, from 1; the number of the record where a format has no lines."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}:{self.line}"
