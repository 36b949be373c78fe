"""JSON: an array of records, or records one after the other, on a line each or on several."""

import io
import json
from collections.abc import Iterator
from typing import Any

from bridge.data.readers.files import File, Malformed, Meter, opened

BLOCK = 1 << 20  # characters read at a time
NEAR = 16  # a fault so close to the end of what was read may be that more is to come
BLANK = " \t\r\n"


def rows(file: File, meter: Meter) -> Iterator[tuple[int, Any]]:
    """(line, record) of each record. The file is never in memory as a whole."""
    with opened(file, meter) as stream:
        yield from _Records(io.TextIOWrapper(stream, "utf-8-sig", newline="")).all()


class _Records:
    """`text[at:]` is what was read and is not used yet; `line` is that of `at`."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self.file, self.text, self.at, self.line, self.ended = file, "", 0, 1, False
        self.decode = json.JSONDecoder().raw_decode

    def all(self) -> Iterator[tuple[int, Any]]:
        if self._next() != "[":
            while self._next():
                yield self.line, self._value()
            return
        self.at += 1
        while (found := self._next()) != "]":
            if not found:
                raise Malformed(self.line, "is the end of an array without its ]; the file is cut off")
            yield self.line, self._value()
            found = self._next()
            if found == ",":
                self.at += 1
            elif found not in ("]", ""):
                raise Malformed(self.line, f"has {found!r} where a comma or the end of the array belongs")
        self.at += 1
        if self._next():
            raise Malformed(self.line, "goes on after the end of the array")

    def _next(self) -> str:
        """The next character that is not blank, empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in BLANK:
                self.line += self.text[self.at] == "\n"
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - NEAR
                if cut and self._more():
                    continue
                at = self.line + self.text.count("\n", self.at, error.pos)
                raise Malformed(at, f"is no JSON ({error.msg})") from error
            if end == len(self.text) and self._more():
                continue  # a number could go on
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return value

    def _more(self) -> bool:
        """Read at least as much as is unused, so that a long record is not tried often."""
        if self.ended:
            return False
        unused = self.text[self.at :]
        try:
            block = self.file.read(max(BLOCK, len(unused)))
        except UnicodeDecodeError as error:
            raise Malformed(self.line, "or a line after it is not UTF-8; convert the file, e.g. with iconv") from error
        self.text, self.at, self.ended = unused + block, 0, not block
        return not self.ended
