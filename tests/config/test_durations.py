"""Lengths of time in the configuration."""

from pathlib import Path
from typing import Any

import pytest

from bridge.config.durations import seconds, text
from bridge.errors import ConfigError
from tests.training.runs import config


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("30m", 1800), ("3h50m", 13800), ("1d", 86400), ("1d2h3m4s", 93784)]
)
def test_texts(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0.2, "0s"), (59.6, "1m"), (90, "1m30s"), (3600, "1h"), (13805, "3h50m"), (93784, "1d2h"), (86402, "1d")],
)
def test_lengths_in_two_units(length: float, expected: str) -> None:
    assert text(length) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (90, "90 is not a duration; a number needs its unit: {key}=90s or 90m; use e.g. 90s, 30m, 3h50m or 1d"),
        ("1.5h", "1.5h is not a duration; use e.g. 90s, 30m, 3h50m or 1d"),
        ("50m3h", "50m3h is not a duration; use e.g. 90s, 30m, 3h50m or 1d"),
        ("", "'' is not a duration; use e.g. 90s, 30m, 3h50m or 1d"),
        (True, "true is not a duration; use e.g. 90s, 30m, 3h50m or 1d"),
        ("0m", "0m is too short; set 1s or more"),
    ],
)
@pytest.mark.parametrize(
    ("section", "key"), [("train", "exit_after"), ("checkpoint", "write_timeout"), ("launch", "hang_timeout")]
)
def test_anything_else_is_one_line_with_an_example(section: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(Path("runs"), **{section: {key: value}})
    full = f"{section}.{key}"
    assert str(caught.value) == f"{full}: " + message.format(key=full)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"iterations_to_skip": [3, 0]}}, "train.iterations_to_skip: 0 is too small; set 1 or more"),
        (
            {"rerun": {"error_injection_rate": 5}},
            "rerun.error_injection_rate: 5 has no effect with rerun.mode=disabled; "
            "set rerun.mode=validate_results or leave it out",
        ),
    ],
)
def test_other_keys_of_resilience(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(Path("runs"), **section)
    assert str(caught.value) == message
