"""data.split: the shares of the documents for training, validation and test. Imports no torch."""

import re

from bridge.errors import ConfigError


def check_split(split: str) -> None:
    """Raises ConfigError unless `split` is like "95,5": up to three numbers, the first of them above 0.

    A second that is 0 or missing leaves nothing to evaluate on.
    """
    parts = [part.strip() for part in split.split(",")]
    if len(parts) > 3 or not all(re.fullmatch(r"\d+\.?\d*|\.\d+", part) for part in parts):
        raise ConfigError(f"data.split: {split!r} is not a list of up to three weights; set e.g. '95,5'")
    if float(parts[0]) == 0:
        raise ConfigError(f"data.split: {split!r} leaves nothing to train on; set e.g. '95,5'")
