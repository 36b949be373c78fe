"""Rules of the house that a reader would otherwise have to remember, read from the source."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# A package imports from rows above its own, and from itself.
LEVELS = (
    {"errors"},
    {"files", "processes"},
    {"config"},
    {"platform"},
    {"command_line", "parallel"},
    {"weights"},
    {"runs"},
    {"models", "peft", "data", "optim"},
    {"checkpoint", "sources", "objectives"},
    {"convert"},
    {"training", "api"},
    {"estimate", "generate"},
    {"launch"},
    {"inspect", "prepare", "status", "sweep_report"},
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

SOURCES = sorted((ROOT / "bridge").rglob("*.py"))
PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _code_words(path: Path) -> Iterator[tuple[int, str]]:
    """(line, word) of names and string literals; comments and docstrings are not code."""
    tree = ast.parse(path.read_text())
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    }
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        is_string = token.type == tokenize.STRING and token.start[0] not in docstrings
        if is_string or token.type == tokenize.NAME:
            yield from ((token.start[0], word) for word in re.findall(r"\w+", token.string))


def test_imports_point_one_way():
    wrong = []
    for path in SOURCES:
        own = path.relative_to(ROOT / "bridge").with_suffix("").parts[0]
        if own == "__init__":
            continue  # the public API, imported lazily
        assert own in LEVEL_OF, f"{_name(path)}: give bridge/{own} a place in LEVELS"
        for line, target in _imports(path):
            parts = target.split(".")
            if parts[0] != "bridge" or len(parts) == 1 or parts[1] == own:
                continue
            if LEVEL_OF.get(parts[1], len(LEVELS)) >= LEVEL_OF[own]:
                wrong.append(f"{_name(path)}:{line}: {own} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_only_launch_imports_hydra():
    wrong = [
        f"{_name(path)}:{line}: {target}"
        for path in SOURCES
        for line, target in _imports(path)
        if target.split(".")[0] in ("hydra", "omegaconf") and "launch" not in path.parts
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("word", "home"), [("cuda", "bridge/platform/"), ("parallel_state", "bridge/parallel.py")])
def test_word_is_code_in_one_place_only(word: str, home: str):
    wrong = [
        f"{_name(path)}:{line}"
        for path in SOURCES
        if not _name(path).startswith(home)
        for line, found in _code_words(path)
        if found == word
    ]
    assert not wrong, f"{word} outside {home}: {wrong}"


def test_what_megatron_core_makes_of_absent_sizes_is_written_once():
    """The width of an MLP and of a head, known to `bridge.config.complete`; Hugging Face has a rule for heads, too."""
    mlp = re.compile(r"4 \* \w*[\w.\[\"(]*(hidden|n_embd)")
    head = re.compile(r"hidden(_size)?[\")\]]* // \w*[\w.\[\"(]*heads")
    texts = {_name(path): path.read_text() for path in SOURCES}
    of_hf = ("bridge/models/hf/", "bridge/models/families/")
    found = {name for name, text in texts.items() if mlp.search(text)}
    found |= {name for name, text in texts.items() if head.search(text) and not name.startswith(of_hf)}
    assert found == {"bridge/config/complete.py"}


def test_an_environment_variable_of_ours_is_named_once():
    """Two parts that chose the same name would read each other's values."""
    named = [
        name for path in SOURCES for name in re.findall(r'^[A-Z_]+ = "(BRIDGE_\w+)"', path.read_text(), re.MULTILINE)
    ]
    assert len(named) > 3 and len(named) == len(set(named)), sorted(named)


def test_files_of_a_run_are_named_in_one_place():
    """Who writes and who reads a file of the run directory takes its name from bridge/runs/run_files.py."""
    from bridge.runs import run_files
    from bridge.weights import pointer

    names = {
        value for name, value in vars(run_files).items() if name.isupper() and isinstance(value, str) and "." in value
    }
    assert {"config.yaml", "metrics.jsonl", "result.json"} <= names
    homes = ("bridge/runs/run_files.py", "bridge/weights/pointer.py")
    wrong = [
        f"{_name(path)}:{node.lineno}: {node.value}"
        for path in SOURCES
        if _name(path) not in homes
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names | {pointer.LATEST}
    ]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_are_short():
    wrong = []
    for path in PYTHON:
        text = path.read_text()
        if len(text.splitlines()) > MAX_FILE_LINES:
            wrong.append(f"{_name(path)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    wrong.append(f"{_name(path)}:{node.lineno}: {node.name} has {lines} lines")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module",
    [
        "bridge",
        "bridge.config.run_config",
        "bridge.launch.driver",
        "bridge.inspect",
        "bridge.prepare",
        "bridge.platform",
        "bridge.checkpoint.__main__",
        "bridge.generate.__main__",
        "bridge.status",
        "bridge.sweep_report",
    ],
)
def test_what_the_driver_imports_costs_no_torch(module: str):
    code = f"import {module}, sys; print(*{{'torch', 'megatron', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_configuration_key_has_a_comment():
    key = re.compile(r"^\s*[A-Za-z_][\w./]*:")
    wrong = []
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        if "hydra" in path.parts:
            continue  # Hydra's own options
        body = path.read_text().splitlines()
        assert body[0].startswith("#"), f"{_name(path)}: the first line says what this file is"
        wrong += [
            f"{_name(path)}:{number}: {line.strip()}"
            for number, line in enumerate(body, 1)
            if key.match(line) and not line.rstrip().endswith(":") and " # " not in line
        ]
    assert not wrong, "\n".join(wrong)


def test_the_product_forks_nothing():
    """What tests/forks/sitecustomize.py notes where it runs: a fork of a process that has threads can hang for ever."""
    forks = re.compile(
        r"preexec_fn=|os\.fork(pty)?\(|ProcessPool|\bPool\(|context\(.fork.\)|start_method\((?!.forkserver)"
    )
    wrong = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forks.search(line)
    ]
    assert not wrong, "\n".join(wrong)
