"""Values against the text of annotations: every form that megatron-core's configuration classes use."""

import dataclasses
from typing import Any, Literal

import pytest

from bridge.config import annotation
from bridge.errors import ConfigError, shown

ENUMS = {"AttnBackend": ("flash", "fused", "auto")}

FITS = [
    ("int", 3),
    ("float", 3),
    ("float", 3.5),
    ("bool", True),
    ("str", "a"),
    ("Optional[int]", None),
    ("Optional[Union[int, List[int]]]", [1, 2]),
    ("Union[int, List[int]]", 4),
    ("Optional[Tuple[int, int]]", [5, 0]),
    ("Tuple[int, int]", (5, 0)),
    ("Optional[Literal['full', 'selective']]", "full"),
    ("Literal['a', None]", None),
    ("torch.dtype", "bf16"),
    ("AttnBackend", "flash"),
    ("Optional[Union[str, list, PipelineParallelLayerLayout]]", [["decoder"]]),
    ("int | None", None),
    ("dict[str, Any]", {"a": object}),
    ("Optional[list[str]]", ["a"]),
]

DOES_NOT_FIT = [
    ("int", True, "a whole number"),
    ("int", 3.0, "a whole number"),
    ("int", None, "a whole number"),
    ("float", True, "a number"),
    ("float", "1e-3", "a number"),
    ("bool", 1, "true or false"),
    ("bool", "true", "true or false"),
    ("str", 3, "a string"),
    ("List[int]", [1, True], "a list, each item a whole number"),
    ("Optional[Tuple[int, int]]", [1], "a list of a whole number, a whole number or null"),
    ("Optional[Literal['full', 'selective']]", "ful", "one of full, selective or null; did you mean 'full'?"),
    ("torch.dtype", "float32", "one of fp32, bf16, fp16, fp8"),
    ("AttnBackend", "flesh", "one of flash, fused, auto; did you mean 'flash'?"),
    ("dict[str, int]", {"a": "b"}, "a mapping"),
    ("Callable[[int], str]", "f", "another key: this one takes no value from a configuration"),
    ("Optional[Optional[int]]", "a", "a whole number or null"),
]


@pytest.mark.parametrize(("text", "value"), FITS)
def test_fitting_value_is_accepted(text: str, value: Any):
    annotation.check("a.b", value, text, ENUMS)


@pytest.mark.parametrize(("text", "value", "expected"), DOES_NOT_FIT)
def test_other_value_is_refused_with_what_to_set(text: str, value: Any, expected: str):
    with pytest.raises(ConfigError) as caught:
        annotation.check("a.b", value, text, ENUMS)
    assert str(caught.value) == f"a.b: {shown(value)} does not fit; set {expected}"


def test_missing_value_says_so():
    with pytest.raises(ConfigError, match=r"^mode: is not set; set one of a$"):
        annotation.check("mode", "???", "Literal['a']")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Optional[Callable]", False),
        ("Optional[ContextManager]", False),
        ("Optional[RecipeConfig]", False),
        ("Optional[Union[str, list, PipelineParallelLayerLayout]]", True),
        ("AttnBackend", True),
        ("Optional[list[str]]", True),
    ],
)
def test_expressible(text: str, expected: bool):
    assert annotation.expressible(text, ENUMS) is expected


def test_text_of_dataclass_fields():
    @dataclasses.dataclass
    class Example:
        plain: int
        choice: Literal["a", "b"]
        optional: list[int] | None

    texts = [annotation.of_dataclass_field(field.type) for field in dataclasses.fields(Example)]
    assert texts == ["int", "Literal['a', 'b']", "list[int] | None"]
