"""A directory written by `save_to_disk` of Hugging Face datasets: Arrow files, and state.json, which lists them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridge.data.readers.files import SAVED_DATASET


def rows(name: str) -> Iterator[tuple[int, Any]]:
    """(number, record) of each row."""
    import pyarrow

    number = 0
    directory = Path(name)
    for listed in json.loads((directory / SAVED_DATASET).read_text())["_data_files"]:
        with pyarrow.memory_map(str(directory / listed["filename"])) as file:
            for batch in pyarrow.ipc.open_stream(file):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
