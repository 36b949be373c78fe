"""JSON lines: a record a line."""

import json
from collections.abc import Iterator
from typing import Any

from bridge.data.readers.files import Malformed, opened


def rows(name: str) -> Iterator[tuple[int, Any]]:
    """(line, record) of each line that is not blank."""
    with opened(name) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise Malformed(number, "is not UTF-8; convert the file, e.g. with iconv") from error
            except json.JSONDecodeError as error:
                raise Malformed(number, f"is no JSON record ({error.msg} at character {error.pos + 1})") from error
            yield number, record
