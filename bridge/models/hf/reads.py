"""Which fields of a config.json transformers can read for a model_type, told by its installed source without importing
it: a field it never reads cannot change the logits.

What is counted errs towards "read": every field of a config class, whatever touches an object that may be a config,
and in files that pick fields by computed names every string that could be one. Parsing takes seconds, and only a
config with a field that no family lists comes here.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# What every model is built and run with: files under transformers/, as patterns, because releases move code about.
SHARED = """
configuration_utils.py modeling_*utils.py modeling_layers.py masking_utils.py cache_utils.py activations.py
initialization.py pytorch_utils.py core_model_loading.py *_mapping.py utils/generic.py utils/output_capturing.py
models/auto/auto_factory.py models/auto/configuration_auto.py integrations/**/*.py quantizers/auto.py quantizers/base.py
"""
OTHER_TASK = re.compile(r"For(?!CausalLM)[A-Z]")  # classes such as GenericForTokenClassification compute no logits
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")


class Reads(NamedTuple):
    """The names that are read, the forms of those put together (`output_{kind}`), and the values as good as absence."""

    names: frozenset[str]
    forms: tuple[re.Pattern[str], ...]
    defaults: dict[str, Any]

    def __contains__(self, name: object) -> bool:
        return name in self.names or any(form.fullmatch(str(name)) for form in self.forms)

    def has_effect(self, name: str, value: Any) -> bool:
        """Whether this field can make another model than a config without it."""
        return name in self and not self.as_if_absent(name, value)

    def as_if_absent(self, name: str, value: Any) -> bool:
        """Whether a config that leaves this field out has this value."""
        return name in self.defaults and (type(value), value) == (type(self.defaults[name]), self.defaults[name])


class Read(NamedTuple):
    """One place that reads a field: `default` holds what stands for absence there, if anything does."""

    name: str
    default: tuple[Any, ...] = ()
    declared: bool = False  # a field of a config class, which every config then has
    presence: bool = False  # asks whether there is such a field at all
    form: bool = False  # `name` is a regular expression


@cache
def of_model_type(model_type: str) -> Reads | None:
    """What the installed transformers reads for a model_type; None when it has no such model, or is not as expected."""
    root = _root()
    folder = root and _folder(root, model_type)
    if root is None or folder is None:
        return None
    files = (*folder.glob("configuration_*.py"), *folder.glob("modeling_*.py"))
    return _reads([read for file in files for read in _in_file(file)] + list(_shared(root)))


@cache
def of_every_model() -> Reads | None:
    """What transformers reads whatever the model, as of one whose class it does not have."""
    root = _root()
    return None if root is None else _reads(_shared(root))


def _reads(found: Sequence[Read]) -> Reads:
    places: dict[str, list[Read]] = {}
    for read in found:
        places.setdefault(read.name, []).append(read)
    forms = {name for name, reads in places.items() if reads[0].form}
    defaults = {name: _default(reads) for name, reads in places.items()}
    plain = {name: default[0] for name, default in defaults.items() if default}
    return Reads(frozenset(places) - forms, tuple(map(re.compile, sorted(forms))), plain)


def _default(reads: Sequence[Read]) -> tuple[Any, ...]:
    """(value,) that is the same as no field: that of the class which declares it, else of all `getattr` that read it.

    Other reads of a field that no class declares fail without it, so they are behind one of those.
    """
    declared = [read.default for read in reads if read.declared]
    asked = [] if any(read.presence for read in reads) else [read.default for read in reads if read.default]
    first, *others = declared or asked or [()]
    same = all(other == first and list(map(type, other)) == list(map(type, first)) for other in others)
    return first if same else ()


def _root() -> Path | None:
    """Folder of transformers, found without importing it."""
    spec = importlib.util.find_spec("transformers")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return next((place for place in places if (place / "configuration_utils.py").is_file()), None)


def _folder(root: Path, model_type: str) -> Path | None:
    """The folder whose configuration declares the model_type: its own, or that of a larger model (gemma3_text)."""
    name = model_type.replace("-", "_")
    folder = next((root / "models" / one for one in (name, name.removesuffix("_text")) if _is_model(root, one)), None)
    declared = f'model_type = "{model_type}"'
    files = folder.glob("configuration_*.py") if folder else ()
    return folder if any(declared in file.read_text(encoding="utf-8") for file in files) else None


def _is_model(root: Path, name: str) -> bool:
    return any((root / "models" / name).glob("modeling_*.py"))


@cache
def _shared(root: Path) -> tuple[Read, ...]:
    files = sorted({file for pattern in SHARED.split() for file in root.glob(pattern)})
    return tuple(read for file in files for read in _in_file(file))


def _in_file(file: Path) -> Iterator[Read]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    configs = _config_names(tree)
    every_string = of_config = file.name.startswith("configuration_")
    for node in _walk(tree):
        if isinstance(node, ast.Attribute) and (of_config or _is_config(node.value, configs)):
            yield Read(node.attr)
        elif isinstance(node, ast.Call) and _called(node) in BY_NAME and len(node.args) > 1:
            name, default = node.args[1], _literal(node.args[2]) if len(node.args) > 2 else ()
            if isinstance(name, ast.Constant):
                yield Read(str(name.value), default, presence=_called(node) == "hasattr")
            elif not (of_config or _is_config(node.args[0], configs)):
                continue
            elif isinstance(name, ast.JoinedStr) and any(isinstance(part, ast.Constant) for part in name.values):
                yield Read("".join(map(_form, name.values)), form=True)
            else:
                every_string = True
        elif isinstance(node, ast.ClassDef) and of_config:
            yield from _declared(node)
    if every_string:
        yield from map(Read, _strings(tree))


def _walk(tree: ast.Module) -> Iterator[ast.AST]:
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if not (isinstance(node, ast.ClassDef) and OTHER_TASK.search(node.name)):
            yield node
            todo.extend(ast.iter_child_nodes(node))


def _config_names(tree: ast.Module) -> set[str]:
    """Variables and parameters that are configs by their annotation, or by what they are assigned, in this file."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation and "Config" in ast.unparse(node.annotation):
            names.add(node.arg)
        elif isinstance(node, ast.Assign) and _is_config(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _is_config(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression looks like a config: `self.config`, `config.get_text_config()`, a name that is one."""
    match node:
        case ast.Name(id=name):
            return name in names or name.endswith(("config", "cfg"))
        case ast.Attribute(attr=name):
            return name.endswith(("config", "cfg"))
        case ast.Call(func=function):
            return _is_config(function, names)
    return False


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _declared(node: ast.ClassDef) -> Iterator[Read]:
    """What a config class declares: fields with their defaults, other attributes, methods and their parameters."""
    for item in node.body:
        match item:
            case ast.AnnAssign(target=ast.Name(id=name), value=value):
                yield Read(name, () if value is None else _literal(value), declared=True)
            case ast.Assign(targets=targets):
                yield from (Read(target.id) for target in targets if isinstance(target, ast.Name))
            case ast.FunctionDef(name=name, args=args):
                yield from map(Read, (name, *(one.arg for one in (*args.args, *args.kwonlyargs))))


def _form(part: ast.expr) -> str:
    return re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"\w+"


def _literal(node: ast.expr) -> tuple[Any, ...]:
    try:
        return (ast.literal_eval(node),)
    except ValueError:
        return ()


def _strings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value
