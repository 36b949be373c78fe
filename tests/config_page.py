"""`python -m tests.config_page` writes docs/config.md from the comments in conf/; `--check` fails if it is stale."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bridge.command_line import Parser, guarded
from bridge.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config.md"
GROUPS = ("model", "parallelism", "optimizer", "precision", "peft", "data", "objective", "recipe")

_VALUE = r"""(?:"[^"]*"|[^"])*?"""
_LINE = re.compile(rf"^(?P<indent> *)(?P<key>[\w.]+):(?P<value>{_VALUE})(?:\s+# (?P<comment>.+)|\s*)$")

_INTRO = """# Configuration

Written by `python -m tests.config_page` from the comments in `conf/`; do not edit.

`python train.py GROUP=OPTION section.key=value` chooses options of groups and sets keys. The sections `model`,
`parallelism`, `optimizer` and `precision` also take every field of megatron-core's `TransformerConfig`,
`DistributedDataParallelConfig` and `OptimizerConfig` and the plain arguments of `GPTModel`, under its own name; listed
here is what the options set.
"""


class Entry(NamedTuple):
    """One key of a YAML file. value is its text; empty where keys are nested below it."""

    key: str
    value: str
    comment: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, or with `--check` compares it. Exit code 1: not current; 2: a key without a comment."""
    return guarded(lambda: _command(arguments))


def _command(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m tests.config_page", description="Write docs/config.md from the comments in conf/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is not current")
    checking = parser.parse_args(arguments).check
    text = page()
    if not checking:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/config.md is not current; run `python -m tests.config_page`", file=sys.stderr)
        return 1
    return 0


def page(conf: Path = ROOT / "conf") -> str:
    """The text of docs/config.md for the YAML files in `conf`. Raises ConfigError for a key without a comment."""
    parts = [_INTRO, "## `train.py`\n", _table(_primary(conf / "train.yaml"))]
    defaults = dict(re.findall(r"^  - (\w+): (\w+)$", (conf / "train.yaml").read_text(encoding="utf-8"), re.MULTILINE))
    for group in GROUPS:
        parts += _group(conf / group, default=defaults.get(group))
    parts += ["## `convert.py`\n", _table(_primary(conf / "convert.yaml"))]
    return "\n".join(parts)


def entries(file: Path) -> Iterator[Entry]:
    """The keys of a YAML file in order, with full names. Raises ConfigError for a key without a comment."""
    parents: list[tuple[int, str]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        found = _LINE.match(line)
        if not found:
            continue
        indent = len(found["indent"])
        parents = [parent for parent in parents if parent[0] < indent]
        key = ".".join([*(name for _, name in parents), found["key"]])
        if key == "defaults":
            continue
        if not found["comment"]:
            raise ConfigError(f"{file}:{number}: {key} has no comment; end the line with '  # what it does'")
        parents.append((indent, found["key"]))
        yield Entry(key, found["value"].strip(), found["comment"])


def summary(file: Path) -> str:
    """The comment in the first line of a YAML file. Raises ConfigError when there is none."""
    first, *rest = file.read_text(encoding="utf-8").splitlines() or [""]
    if first == "# @package _global_" and rest:
        first = rest[0]
    if not first.startswith("# "):
        raise ConfigError(f"{file}:1: does not start with a comment; say in one line what the option is")
    return first.removeprefix("# ")


def _primary(file: Path) -> list[Entry]:
    return [entry for entry in entries(file) if entry.key.split(".")[0] != "hydra"]


def _group(folder: Path, *, default: str | None) -> list[str]:
    files = sorted(folder.glob("*.yaml"), key=lambda file: (file.stem != default, file.stem))
    if not files:
        return []
    options = [f"| `{file.stem}`{' (default)' if file.stem == default else ''} | {summary(file)} |" for file in files]
    heading = [f"## `{folder.name}=`\n", "\n".join(["| option | |", "|---|---|", *options, ""])]
    if folder.name == "recipe":  # its keys belong to the sections above
        for file in files:
            list(entries(file))
        return heading
    merged: dict[str, Entry] = {}
    for file in files:
        for entry in entries(file):
            suffix = "" if file.stem == default else f" (`{file.stem}`)"
            merged.setdefault(
                entry.key, entry._replace(key=f"{folder.name}.{entry.key}", value=(_code(entry.value) + suffix).strip())
            )
    return [*heading, _rows(list(merged.values()))]


def _table(listed: list[Entry]) -> str:
    return _rows([entry._replace(value=_code(entry.value)) for entry in listed])


def _rows(listed: list[Entry]) -> str:
    rows = [f"| `{entry.key}` | {entry.value} | {entry.comment.replace('|', chr(92) + '|')} |" for entry in listed]
    return "\n".join(["| key | value | meaning |", "|---|---|---|", *rows, ""])


def _code(value: str) -> str:
    return f"`{value}`" if value else ""


if __name__ == "__main__":
    sys.exit(main())
