"""docs/models.md lists every family, and the differences it states are within the tolerance of the tests."""

import re

import pytest

from bridge.models import family
from tests import families, hf_models
from tests.models.table import INTRO, PAGE, special
from tests.models.test_families import TOLERANCE


@pytest.mark.parametrize("name", family.known_names())
def test_row_of(name: str):
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    _, _, sizes, architecture, text, difference, _ = (cell.strip() for cell in row.split("|"))
    assert set(re.findall(r"`(\w+)`", sizes)) == set(families.get(name, "SIZES"))
    assert architecture == f"`{family.by_name(name).architecture}`"
    assert text == special(name)
    measured, count = re.fullmatch(r"(\S+) of \d+ \((\d+) models\)", difference).groups()  # type: ignore[union-attr]
    assert float(measured) < TOLERANCE
    assert int(count) == len(hf_models.variants(name))


def test_nothing_else_is_in_the_table():
    text = PAGE.read_text()
    assert text.startswith(INTRO)
    assert len(text.removeprefix(INTRO).splitlines()) == len(family.known_names())
