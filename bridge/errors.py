"""Errors a user can cause, and the nearest-name hint they carry. Imports nothing but the standard library."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class BridgeError(Exception):
    """The user's input is wrong: printed as one line, exit code 2, no traceback."""


class ConfigError(BridgeError):
    """A configuration key or value is wrong: `<key>: <what is wrong, with the value>; <what to set instead>`."""


class ConversionError(BridgeError):
    """A model directory cannot be converted as asked. Message names the directory, file, field or tensor."""


class DamagedError(ConversionError):
    """A file of a model directory is damaged: cut short, changed or unreadable. Message names the file."""


class RunError(Exception):
    """The machine failed a run, as a full disk does: printed as one line, exit code 1, no traceback."""


class Stopped(BaseException):
    """A signal asked to stop where there is nothing to save. Not an Exception, as it is not a failure."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or an empty string when none is near."""
    return which_of(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6))


def which_of(names: Sequence[str]) -> str:
    """`; did you mean 'x', 'y' or 'z'?`, or an empty string without any."""
    *first, last = (f"'{name}'" for name in names or [""])
    return f"; did you mean {', '.join(first)}{' or ' if first else ''}{last}?" if names else ""


def shown(value: Any) -> str:
    """`value` as YAML would have it: true, null, 1e-05, [1, 2], {a: 1}; a text has quotes only where it needs them."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        if _is_plain(value):
            return value
        return json.dumps(value, ensure_ascii=False) if "'" in value or not value.isprintable() else f"'{value}'"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{shown(key)}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def _is_plain(text: str) -> bool:
    """Whether YAML reads `text` as itself without quotes: one word, and neither a number nor true, false or null."""
    if not re.fullmatch(r"[\w/.~][\w/.~+:=@-]*", text) or text.endswith(":"):
        return False
    return not re.fullmatch(r"(?i)~|true|false|yes|no|on|off|null|[+-]?\.?\d[\d_.:]*(e[+-]?\d+)?|\.inf|\.nan", text)
