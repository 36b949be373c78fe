"""What errors share: values as YAML has them."""

from typing import Any

import pytest
import yaml

from bridge.errors import shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (0.5, "0.5"),
        ("bf16", "bf16"),
        ("models/llama", "models/llama"),
        ("true", "'true'"),
        ("1e-3", "'1e-3'"),
        ("95,5", "'95,5'"),
        ("", "''"),
        ("it's", '"it\'s"'),
        ("two\nlines", '"two\\nlines"'),
        ([7, None], "[7, null]"),
        (("a", False), "[a, false]"),
        ({"steps": 5, "name": "a b"}, "{steps: 5, name: 'a b'}"),
    ],
)
def test_a_value_is_shown_as_yaml_reads_it(value: Any, text: str):
    assert shown(value) == text
    assert yaml.safe_load(text) == (list(value) if isinstance(value, tuple) else value)
