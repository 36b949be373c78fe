"""Rows are texts, or records with one."""

from collections.abc import Iterable, Iterator

from bridge.data.readers.reader import Row
from bridge.errors import ConfigError, did_you_mean, shown


def documents(rows: Iterable[Row], *, field: str) -> Iterator[str]:
    """The text of each row that has one. Raises ConfigError naming file and line."""
    for row in rows:
        if text := text_of(row, field=field):
            yield text


def text_of(row: Row, *, field: str) -> str:
    """The text of a row, in a record that of `field`; empty for null."""
    value = row.value
    if isinstance(value, dict):
        if field not in value:
            hint = did_you_mean(field, value) or f"; set one of {', '.join(value) or 'its fields'}"
            raise ConfigError(f"data.field: {row.where} has no field {field}{hint}")
        value = "" if value[field] is None else value[field]
    if not isinstance(value, str):
        where = f"the field {field} of {row.where}" if isinstance(row.value, dict) else row.where
        raise ConfigError(f"data.field: {where} is {shown(value)[:80]}, not text; set the field that has the text")
    return value
