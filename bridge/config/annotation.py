"""Checks plain values (what YAML can say) against the text of a type annotation, without importing what it names.

Understood: bool int float str None Any, Optional, Union and `|`, list/List, tuple/Tuple, dict/Dict, Literal,
torch.dtype (one of DTYPES) and enumerations by member name. Anything else (Callable, a class) cannot be written in
YAML: no value fits it.
"""

import ast
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from bridge.errors import ConfigError, did_you_mean, shown

# How a dtype is written in a configuration, and the attribute of `torch` it means. mcore keeps fp8 states as bytes.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "uint8"}

Enums = Mapping[str, Sequence[str]]

_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string", "None": "null"}


class _Type(NamedTuple):
    """One annotation. kind: a plain name, or choice, list, tuple, dict, union, any, foreign."""

    kind: str
    items: tuple["_Type", ...] = ()
    choices: tuple[Any, ...] = ()


def check(key: str, value: Any, annotation: str, enums: Enums | None = None) -> None:
    """Raises ConfigError `<key>: <value> ...; set ...` unless `value` fits `annotation`.

    bool is not int; int is a float; a list is a tuple of its length. `enums`: enumeration name -> member names.
    """
    kind = _resolve(_parse(annotation), enums or {})
    if _fits(value, kind):
        return
    if value == "???":
        raise ConfigError(f"{key}: is not set; set {_describe(kind)}")
    raise ConfigError(f"{key}: {shown(value)} does not fit; set {_describe(kind)}{_nearest_choice(value, kind)}")


def expressible(annotation: str, enums: Enums) -> bool:
    """Whether YAML can hold some value of this type other than null."""
    return _expressible(_resolve(_parse(annotation), enums))


def of_dataclass_field(declared: Any) -> str:
    """The annotation text of a dataclasses.Field.type, which is a class, a typing object or already text."""
    if isinstance(declared, str):
        return declared
    return declared.__name__ if type(declared) is type else str(declared).replace("typing.", "")


@cache
def _parse(annotation: str) -> _Type:
    return _from_node(ast.parse(annotation, mode="eval").body)


def _from_node(node: ast.expr) -> _Type:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union(_from_node(node.left), _from_node(node.right))
    if isinstance(node, ast.Constant) and node.value is None:
        return _Type("None")
    if isinstance(node, ast.Subscript):
        return _from_subscript(node)
    name = ast.unparse(node)
    known = {"torch.dtype": "dtype", "Any": "any", "NoneType": "None"}
    bare = {"list": "list", "List": "list", "tuple": "tuple", "Tuple": "tuple", "dict": "dict", "Dict": "dict"}
    if name in known or name in _WORDS:
        kind = known.get(name, name)
        return _Type("choice", choices=tuple(DTYPES)) if kind == "dtype" else _Type(kind)
    if name in bare:
        return _Type(bare[name])
    return _Type("foreign", choices=(name,))


def _from_subscript(node: ast.Subscript) -> _Type:
    outer = ast.unparse(node.value)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer == "Literal":
        return _Type("choice", choices=tuple(ast.literal_eval(part) for part in parts))
    if outer == "Callable":
        return _Type("foreign", choices=("Callable",))
    inner = tuple(_from_node(part) for part in parts if not (isinstance(part, ast.Constant) and part.value is ...))
    if outer == "Optional":
        return _union(*inner, _Type("None"))
    if outer == "Union":
        return _union(*inner)
    kinds = {
        "list": "list",
        "List": "list",
        "tuple": "tuple",
        "Tuple": "tuple",
        "dict": "dict",
        "Dict": "dict",
    }
    return _Type(kinds[outer], inner) if outer in kinds else _Type("foreign", choices=(outer,))


def _union(*items: _Type) -> _Type:
    """One union of all the alternatives, nested ones included."""
    flat = [inner for item in items for inner in (item.items if item.kind == "union" else (item,))]
    return _Type("union", tuple(dict.fromkeys(flat)))


def _resolve(kind: _Type, enums: Enums) -> _Type:
    """Turns the names of enumerations into choices among their members."""
    if kind.kind == "foreign" and kind.choices[0] in enums:
        return _Type("choice", choices=tuple(enums[kind.choices[0]]))
    return kind._replace(items=tuple(_resolve(item, enums) for item in kind.items))


def _fits(value: Any, kind: _Type) -> bool:
    match kind.kind:
        case "any":
            return True
        case "None":
            return value is None
        case "bool" | "str":
            return type(value).__name__ == kind.kind
        case "int":
            return type(value) is int
        case "float":
            return type(value) in (int, float)
        case "choice":
            return any(type(value) is type(choice) and value == choice for choice in kind.choices)
        case "union":
            return any(_fits(value, item) for item in kind.items)
        case "list":
            return isinstance(value, list) and all(_fits(item, kind.items[0]) for item in value if kind.items)
        case "tuple":
            if not isinstance(value, list | tuple):
                return False
            same_length = not kind.items or len(value) == len(kind.items)
            return same_length and all(map(_fits, value, kind.items))
        case "dict":
            fits_key = isinstance(value, dict) and all(isinstance(name, str) for name in value)
            return fits_key and all(_fits(item, kind.items[1]) for item in value.values() if kind.items)
    return False


def _describe(kind: _Type) -> str:
    match kind.kind:
        case "choice":
            return "one of " + ", ".join(map(shown, kind.choices))
        case "union":
            return " or ".join(dict.fromkeys(_describe(item) for item in kind.items if item.kind != "foreign"))
        case "list":
            return f"a list, each item {_describe(kind.items[0])}" if kind.items else "a list"
        case "tuple":
            return "a list of " + ", ".join(map(_describe, kind.items)) if kind.items else "a list"
        case "dict":
            return "a mapping"
    return _WORDS.get(kind.kind, "another key: this one takes no value from a configuration")


def _nearest_choice(value: Any, kind: _Type) -> str:
    choices = [choice for item in (kind, *kind.items) for choice in item.choices if item.kind == "choice"]
    return did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""


def _expressible(kind: _Type) -> bool:
    if kind.kind == "union":
        return any(_expressible(item) for item in kind.items if item.kind != "None")
    return kind.kind != "foreign" and (kind.kind == "dict" or all(_expressible(item) for item in kind.items))
