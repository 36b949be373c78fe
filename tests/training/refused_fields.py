"""`python -m tests.training.refused_fields` writes refused_fields.txt: which of megatron-core's fields bridge refuses.

The tables of bridge say which. This list says it again where a reviewer sees the diff, beside what reads the field.
"""

import re
from functools import cache
from pathlib import Path

from bridge.config import effect, mcore_fields, routing
from tests.training import every_field

LIST = Path(__file__).with_suffix(".txt")
READ = re.compile(r"(?<=config\.)\w+|(?<=config, ['\"])\w+|(?<=config\[0\]\.)\w+")

# What megatron-core makes or sets itself, and what bridge sets, whatever the user wants.
NOT_FROM_YAML = {
    name
    for fields in mcore_fields.targets().values()
    for name, field in fields.items()
    if name in routing._REFUSED or name in routing._FIXED or not mcore_fields.expressible(field)
} - {"activation_func"}
UNREAD = {name: reason for reason, names in effect.UNREAD for name in names.split()}
REFUSED = NOT_FROM_YAML | UNREAD.keys() | effect.OLD_NAMES.keys() | every_field.NEEDS_GPU | {"average_in_collective"}


@cache
def readers() -> dict[str, list[str]]:
    """Name -> megatron-core's files that read it from a config, but for those that declare the classes."""
    root = mcore_fields._root()
    declared = {root / file for classes in mcore_fields._DATACLASSES.values() for file, _ in classes}
    found: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        if path not in declared:
            for name in set(READ.findall(path.read_text())):
                found.setdefault(name, []).append(path.relative_to(root).as_posix())
    return found


def listed() -> str:
    """What refused_fields.txt should be."""
    lines = [
        f"{name}: {_why(name)}; read by: {', '.join(readers().get(name, ['nothing']))}" for name in sorted(REFUSED)
    ]
    return "\n".join(lines) + "\n"


def _why(name: str) -> str:
    if name in NOT_FROM_YAML:
        return "not the user's to set"
    if name in every_field.NEEDS_GPU:
        return "needs a GPU"
    return UNREAD.get(name, "an old name" if name in effect.OLD_NAMES else "of no use here")


if __name__ == "__main__":
    LIST.write_text(listed())
