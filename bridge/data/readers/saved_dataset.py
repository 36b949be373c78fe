"""A directory written by `save_to_disk` of Hugging Face datasets: Arrow files, and state.json, which lists them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridge.data.readers.files import SAVED_DATASET, File, Meter


def rows(file: File, meter: Meter) -> Iterator[tuple[int, Any]]:
    """(number, record) of each row."""
    import pyarrow

    number = 0
    directory = Path(file.name)
    for listed in json.loads((directory / SAVED_DATASET).read_text())["_data_files"]:
        meter.read += (directory / listed["filename"]).stat().st_size
        with pyarrow.memory_map(str(directory / listed["filename"])) as stream:
            for batch in pyarrow.ipc.open_stream(stream):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
