"""Names of tensors, and of entries of stacked tensors: `experts.gate_up_proj[3]` is entry 3 along dim 0 of that tensor.

Both sides stack: megatron-core keeps the experts of a layer (and, by its default, the layers) under one key, some
Hugging Face files keep all experts in one tensor. Everything here moves entries, so a stack never has to be in memory.
"""

import re
from collections.abc import Iterable, Mapping

from bridge.weights.spec import TensorSpec

_INDEX = re.compile(r"\[(\d+)\]")


def split_index(name: str) -> tuple[str, tuple[int, ...]]:
    """`a.b[3]` -> ("a.b", (3,)); `a.b` -> ("a.b", ())."""
    base, bracket, _ = name.partition("[")
    return base, tuple(int(number) for number in _INDEX.findall(name)) if bracket else ()


def entry(name: str, *index: int) -> str:
    """The name of an entry: `entry("a", 3) == "a[3]"`; without an index the name itself."""
    return name + "".join(f"[{number}]" for number in index)


def spread(found: Mapping[str, TensorSpec], *, wanted: Iterable[str]) -> dict[str, TensorSpec]:
    """`found` with every stack of which `wanted` names an entry replaced by its entries, whatever their number."""
    depth = {base: len(index) for base, index in map(split_index, wanted) if index}
    spreaded: dict[str, TensorSpec] = {}
    for name, spec in found.items():
        for leaf in _entries(name, spec.shape[: depth.get(name, 0)]):
            spreaded[leaf] = TensorSpec(spec.dtype, spec.shape[depth.get(name, 0) :])
    return spreaded


def stack(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The inverse for whole stacks: entries of one level become one tensor, in the order of their first entry."""
    sizes: dict[str, int] = {}
    for base, index in map(split_index, specs):
        sizes[base] = max(sizes.get(base, 0), index[0] + 1 if index else 0)
    stacked = {}
    for base, size in sizes.items():
        dtype, shape = specs[entry(base, 0) if size else base]
        stacked[base] = TensorSpec(dtype, (size, *shape) if size else shape)
    return stacked


def _entries(name: str, sizes: tuple[int, ...]) -> list[str]:
    names = [name]
    for size in sizes:
        names = [entry(one, number) for one in names for number in range(size)]
    return names
