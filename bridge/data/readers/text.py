"""Plain text: a file is a document. One that is long is several, which end where a line does."""

import codecs
from collections.abc import Iterator

from bridge.data.readers.files import File, Malformed, Meter, opened

LONGEST = 1 << 20  # bytes, and then to the end of the line: no file need fit into memory


def rows(file: File, meter: Meter) -> Iterator[tuple[int, str]]:
    """(line, text) of each document."""
    line = 1
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with opened(file, meter) as stream:
        while block := stream.read(LONGEST):
            block += stream.readline(LONGEST)
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                at = line + error.object.count(b"\n", 0, error.start)
                raise Malformed(at, "is not UTF-8; convert the file, e.g. with iconv") from error
            yield line, text
            line += text.count("\n")
    if decoder.getstate()[0]:
        raise Malformed(line, "ends within a UTF-8 character; it is cut off")
