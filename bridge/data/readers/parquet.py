"""Parquet files."""

from collections.abc import Iterator
from typing import Any

from bridge.data.readers.files import File, Meter, opened

ROWS = 1000  # made into Python values at a time


def rows(file: File, meter: Meter) -> Iterator[tuple[int, Any]]:
    """(number, record) of each row."""
    import pyarrow.parquet

    number = 0
    with opened(file, meter) as stream:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=ROWS):
            for record in batch.to_pylist():
                number += 1
                yield number, record
