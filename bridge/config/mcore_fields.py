"""The fields of megatron-core's configuration dataclasses, read from the installed source.

The driver must know every field name and type, but importing megatron-core imports torch (seconds); parsing four files
takes about 40 ms.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bridge.config import annotation
from bridge.errors import ConfigError


class Field(NamedTuple):
    """One field: its annotation and default as source text; default is None where there is none."""

    annotation: str
    default: str | None


# Where each part of a routed configuration is declared: source file under megatron/core, classes from base to derived.
_DATACLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": (
        ("model_parallel_config.py", "ModelParallelConfig"),
        ("transformer/transformer_config.py", "TransformerConfig"),
    ),
    "mla": (("transformer/transformer_config.py", "MLATransformerConfig"),),
    "ddp": (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
    "optimizer": (("optimizer/optimizer_config.py", "OptimizerConfig"),),
}


@cache
def targets() -> dict[str, dict[str, Field]]:
    """Part of Routed (transformer, ddp, optimizer, gpt) -> name -> Field, as installed megatron-core declares them.

    The transformer part includes the fields that only MLATransformerConfig has (`mla_only`).
    """
    fields = {part: _merged(classes) for part, classes in _DATACLASSES.items()}
    fields["transformer"] = fields.pop("mla") | fields["transformer"]
    return fields | {"gpt": gpt_arguments()}


@cache
def mla_only() -> frozenset[str]:
    """Names of the fields that MLATransformerConfig adds to TransformerConfig."""
    return frozenset(_merged(_DATACLASSES["mla"]).keys() - _merged(_DATACLASSES["transformer"]).keys())


@cache
def model_parallel() -> frozenset[str]:
    """Names of the fields of ModelParallelConfig: layout, precision and communication, never architecture."""
    return frozenset(_merged(_DATACLASSES["transformer"][:1]))


@cache
def gpt_arguments() -> dict[str, Field]:
    """The arguments of GPTModel.__init__, except self."""
    init = next(
        node
        for node in _class("models/gpt/gpt_model.py", "GPTModel").body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    arguments = init.args.args[1:]
    padding: list[ast.expr | None] = [None] * (len(arguments) - len(init.args.defaults))
    return {
        argument.arg: _field(argument.annotation, default)
        for argument, default in zip(arguments, [*padding, *init.args.defaults], strict=True)
    }


@cache
def enums() -> dict[str, tuple[str, ...]]:
    """Enumeration name -> member names, of those that configuration fields use."""
    return {
        node.name: tuple(
            item.targets[0].id
            for item in node.body
            if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name)
        )
        for node in _module("transformer/enums.py").body
        if isinstance(node, ast.ClassDef)
    }


def checked_annotation(field: Field) -> str:
    """The field's annotation; mcore writes `x: int = None` for Optional[int] in places."""
    return f"Optional[{field.annotation}]" if field.default == "None" else field.annotation


@cache
def defaults() -> dict[str, Any]:
    """Field -> megatron-core's default as a configuration writes it, of all fields that have one and YAML can hold.

    Of a field in several classes it is TransformerConfig's: OptimizerConfig writes None for the fp8_recipe "delayed".
    """
    known = [item for fields in reversed(targets().values()) for item in fields.items()]
    return {name: _plain(field.default) for name, field in known if field.default is not None and expressible(field)}


def expressible(field: Field) -> bool:
    """Whether a YAML file can set this field at all (callables and objects: no)."""
    return annotation.expressible(field.annotation, enums())


@cache
def _merged(classes: tuple[tuple[str, str], ...]) -> dict[str, Field]:
    return {
        item.target.id: _field(item.annotation, item.value)
        for file, name in classes
        for item in _class(file, name).body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _field(declared: ast.expr | None, default: ast.expr | None) -> Field:
    assert declared is not None, "megatron-core declares a field without a type"
    if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
        keywords = {keyword.arg: keyword.value for keyword in default.keywords}
        default = keywords.get("default")
    return Field(ast.unparse(declared), None if default is None else ast.unparse(default))


def _plain(default: str) -> Any:
    """The value of a default's source text: a literal, `torch.float32`, `AttnBackend.auto`, or `1024 * 1024`."""
    node = ast.parse(default, mode="eval").body
    if isinstance(node, ast.Attribute):
        dtypes = {name: written for written, name in annotation.DTYPES.items()}
        return dtypes.get(node.attr, node.attr)
    if isinstance(node, ast.BinOp):
        left, right = ast.literal_eval(node.left), ast.literal_eval(node.right)
        return left**right if isinstance(node.op, ast.Pow) else left * right
    return ast.literal_eval(node)


def _class(file: str, name: str) -> ast.ClassDef:
    return next(node for node in _module(file).body if isinstance(node, ast.ClassDef) and node.name == name)


@cache
def _module(file: str) -> ast.Module:
    return ast.parse((_root() / file).read_text(encoding="utf-8"))


@cache
def _root() -> Path:
    """Folder of megatron.core. `megatron` is a namespace package: finding it imports nothing."""
    spec = importlib.util.find_spec("megatron")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "core" / "model_parallel_config.py").is_file():
            return Path(place) / "core"
    raise ConfigError("megatron-core: not installed in this Python; run `pip install megatron-core==0.16.1`")
