"""JSON lines: a record a line."""

import json
from collections.abc import Iterator
from typing import Any

from bridge.data.readers.files import File, Malformed, Meter, opened


def rows(file: File, meter: Meter) -> Iterator[tuple[int, Any]]:
    """(line, record) of each line that is not blank."""
    with opened(file, meter) as stream:
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise Malformed(number, "is not UTF-8; convert the file, e.g. with iconv") from error
            except json.JSONDecodeError as error:
                raise Malformed(number, f"is no JSON record ({error.msg} at character {error.pos + 1})") from error
            yield number, record
