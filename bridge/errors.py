"""Errors a user can cause, and the nearest-name hint they carry. Imports nothing but the standard library."""

import difflib
from collections.abc import Iterable, Sequence


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
    """A signal asked to stop where there is nothing to save. No Exception: it is no failure, whatever is being done."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or an empty string when none is near."""
    return which_of(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6))


def which_of(names: Sequence[str]) -> str:
    """`; did you mean 'x', 'y' or 'z'?`, or an empty string without any."""
    *first, last = (f"'{name}'" for name in names or [""])
    return f"; did you mean {', '.join(first)}{' or ' if first else ''}{last}?" if names else ""
