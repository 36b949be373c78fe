"""Lengths of time as people write them: 90s, 30m, 3h50m, 1d."""

import re
from typing import Any

from bridge.errors import ConfigError, shown

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_TEXT = re.compile("".join(rf"(?:(\d+){unit})?" for unit in UNITS))


def seconds(text: str) -> int:
    """How long `text` is: whole numbers, each with its unit, the largest unit first. ValueError for anything else."""
    found = _TEXT.fullmatch(text)
    if not text or found is None:
        raise ValueError(f"{text!r} is not a duration")
    return sum(int(number or 0) * size for number, size in zip(found.groups(), UNITS.values(), strict=True))


def text(length: float) -> str:
    """So many seconds in the two largest units that count: 45s, 12m5s, 3h50m, 2d; `seconds` reads it back."""
    rest, parts = max(0, round(length)), []
    for unit, size in UNITS.items():
        number, rest = divmod(rest, size)
        parts.append((number, unit))
    first = next((place for place, (number, _) in enumerate(parts) if number), len(parts) - 1)
    shown = [f"{number}{unit}" for number, unit in parts[first : first + 2] if number]
    return "".join(shown) or "0s"


def check(key: str, value: Any) -> None:
    """ConfigError unless `value` is a length of time of a second or more, as text."""
    try:
        long_enough = seconds(str(value)) > 0
    except ValueError:
        unit = f"; a number needs its unit: {key}={value}s or {value}m" if str(value).isdigit() else ""
        raise ConfigError(f"{key}: {shown(value)} is not a duration{unit}; use e.g. 90s, 30m, 3h50m or 1d") from None
    if not long_enough:
        raise ConfigError(f"{key}: {shown(value)} is too short; set 1s or more")
