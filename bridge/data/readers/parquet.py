"""Parquet files."""

from collections.abc import Iterator
from typing import Any

from bridge.data.readers.files import opened

ROWS = 1000  # made into Python values at a time


def rows(name: str) -> Iterator[tuple[int, Any]]:
    """(number, record) of each row."""
    import pyarrow.parquet

    number = 0
    with opened(name) as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=ROWS):
            for record in batch.to_pylist():
                number += 1
                yield number, record
