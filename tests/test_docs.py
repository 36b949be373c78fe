"""Every command in README.md and docs/ runs as written, made small by overrides appended here and nowhere else."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hf_models

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]

# A word of a command -> what it stands for in an environment that is not activated, outside the checkout.
WORDS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "train.py": [str(ROOT / "train.py")],
    "convert.py": [str(ROOT / "convert.py")],
    "benchmarks/convert.py": [str(ROOT / "benchmarks" / "convert.py")],
}
SMALL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=2",
    "model.num_query_groups=2",
    "data.sequence_length=32",
    "train.steps=20",
    "train.eval_interval=null",
    "train.eval_samples=8",
    "scheduler.lr_warmup_steps=2",
]
# Part of a command -> nothing is appended to it.
UNCHANGED = (
    "data=mock",
    "--help",
    "cp -r",
    "--cfg",
    "dry_run=true",
    "plan=true",
    "convert.py",
    "bridge.generate",
    "bridge.checkpoint",
    "bridge.status",
    "bridge.sweep_report",
    "rl_step.py",
)
EXIT_CODES = {"train.exit_interval=10": 75, "persistent_error": 75}
# .ci/run executes the test command; installing and training for real would take minutes here.
NOT_RUN = "python3 -m venv"


def _blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of what a page runs, in its order."""
    text = (ROOT / page).read_text()
    return re.findall(r"^```(bash|python)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _commands(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip() and not line.startswith(NOT_RUN)]


def _small(command: str) -> list[str]:
    words = [part for word in shlex.split(command) for part in WORDS.get(word, [word])]
    return words if any(part in command for part in UNCHANGED) else words + SMALL


def _run(words: list[str], *, folder: Path, code: int, shown: str) -> None:
    # In a checkout the scripts lie in the current folder, so that modules beside them are found.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    done = subprocess.run(
        words, cwd=folder, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == code, f"{shown}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)])
def test_commands_run(page: str, tmp_path: Path):
    """A python block whose first line is a comment with a path is that file; other blocks run."""
    hf_models.save("llama", tmp_path / "models" / "llama")
    for language, block in _blocks(page):
        path = re.match(r"# ([\w/]+\.py)$", block, flags=re.MULTILINE)
        if language == "python" and path:
            (tmp_path / path[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path[1]).write_text(block)
        elif language == "python":
            _run([sys.executable, "-c", block], folder=tmp_path, code=0, shown=block)
        for command in _commands(block) if language == "bash" else ():
            code = next((code for part, code in EXIT_CODES.items() if part in command), 0)
            _run(_small(command), folder=tmp_path, code=code, shown=command)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    missing = [
        link for link in links if not link.startswith("http") and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert not missing


def test_ci_runs_the_readme_test_command():
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if "python -m pytest" in line)
    assert line.startswith(NOT_RUN)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "grep -m 1 'python -m pytest' README.md" in (ROOT / ".ci" / "run").read_text()
