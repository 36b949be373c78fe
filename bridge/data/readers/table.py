"""Tables as text: .csv and .tsv, whose first line names the columns."""

import csv
import io
from collections.abc import Iterator

from bridge.data.readers.files import File, Malformed, Meter, opened, suffixes

LARGEST_FIELD = (1 << 31) - 1  # Python's own limit is 128 KiB


def rows(file: File, meter: Meter) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, record) of each row, all values text."""
    csv.field_size_limit(LARGEST_FIELD)
    delimiter = "\t" if suffixes(file.name)[0] == ".tsv" else ","
    with opened(file, meter) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        line = 1
        while True:
            try:
                columns = reader.fieldnames or ()
                line = reader.line_num + 1
                record = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise Malformed(line, "or a line after it is not UTF-8; convert the file, e.g. with iconv") from error
            except csv.Error as error:
                raise Malformed(line, f"is no row of a table ({error})") from error
            count = sum(value is not None for key, value in record.items() if key is not None)
            count += len(record.get(None, ()))
            if count != len(columns):
                raise Malformed(line, f"has {count} values for the {len(columns)} columns of the first line")
            yield line, record
