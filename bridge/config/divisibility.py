"""One kind of rule, `whole % (a x b) must be 0`, whose message gives the formula, the numbers and legal values near."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bridge.errors import ConfigError


class Number(NamedTuple):
    """A number in a formula."""

    name: str
    value: int
    key: str = ""  # full key of what sets it; empty when nothing does
    movable: bool = True  # whether a message may propose another value


def require(whole: Number, *, by: Sequence[Number], note: str = "") -> None:
    """Raises ConfigError unless whole is a multiple of the product of `by`. `note` follows the numbers.

    The error is put on the first divisor above 1 that has a key, else on the key of `whole`.
    """
    product = math.prod(number.value for number in by)
    if whole.value % product == 0:
        return
    movable = [number for number in by if number.movable and number.value > 1]
    key = next((number.key for number in movable if number.key), whole.key or whole.name)
    advice = (
        [f"{whole.key or whole.name} to {either(nearest_multiples(whole.value, product))}"] if whole.movable else []
    )
    for number in movable:
        others = product // number.value
        legal = [size for size in divisors(whole.value) if whole.value % (others * size) == 0]
        advice += [f"{number.key or number.name} to {either(nearest(legal, number.value))}"] if legal else []
    raise ConfigError(
        f"{key}: {whole.name} % {_product(number.name for number in by)} must be 0, but "
        f"{whole.value} % {_product(str(number.value) for number in by)} = {whole.value % product}{note}; "
        f"set {', or '.join(advice)}"
    )


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def nearest(legal: Sequence[int], wanted: int) -> list[int]:
    """Of the ascending `legal` values: the last one up to `wanted` and the first one above, where there are such."""
    below, above = [size for size in legal if size <= wanted], [size for size in legal if size > wanted]
    return below[-1:] + above[:1]


def nearest_multiples(number: int, of: int) -> list[int]:
    """The positive multiples of `of` next to `number`."""
    below = number // of * of
    return [below, below + of] if below else [of]


def either(values: Sequence[int]) -> str:
    """`4 or 8`"""
    return " or ".join(map(str, values))


def _product(factors: Iterable[str]) -> str:
    shown = list(factors)
    return shown[0] if len(shown) == 1 else f"({' x '.join(shown)})"
