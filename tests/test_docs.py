"""Every command in README.md and docs/ runs as written, made small by overrides appended here and nowhere else.

Processes are warm (tests/warm) but for the main job, README's first command, and one each of the other ways to start.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests import hf_models, warm

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
    "train.py train.steps=320",  # goes on from the main job
)
# Part of a command -> it works on the main job's model, of which the sizes stay.
OF_THE_MAIN_JOB = "init.path=models/tiny"
# Part of a command -> its processes are real ones, in which nothing is imported yet.
REAL = ("--help", "train.py -m optimizer.lr=1e-3,3e-4", "torchrun --nproc-per-node=2 train.py name=ranks")
EXIT_CODES = {"train.exit_interval=10": 75, "persistent_error": 75}
# .ci/run executes the test command; the main job is a test of its own.
NOT_RUN = "python3 -m venv"


def _blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of what a page runs, in its order."""
    text = (ROOT / page).read_text()
    return re.findall(r"^```(bash|python)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _commands(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip() and not line.startswith(NOT_RUN)]


def _small(command: str) -> list[str]:
    words = [part for word in shlex.split(command) for part in WORDS.get(word, [word])]
    if any(part in command for part in UNCHANGED):
        return words
    kept = ["model."] * (OF_THE_MAIN_JOB in command) + ["train.steps"] * ("train.epochs" in command)
    return words + [word for word in SMALL if not word.startswith(tuple(kept))]


def _run(words: list[str], *, folder: Path, code: int, shown: str) -> str:
    """What it printed."""
    # In a checkout the scripts lie in the current folder, so that modules beside them are found.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    if "benchmarks/" in shown:
        (folder / "tmp").mkdir()
        env["TMPDIR"] = str(folder / "tmp")
    with warm.real() if any(part in shown for part in REAL) else nullcontext():
        done = subprocess.run(
            words, cwd=folder, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
        )
    assert done.returncode == code, f"{shown}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _run_page(page: str, folder: Path) -> None:
    """A python block whose first line is a comment with a path is that file; other blocks run."""
    for language, block in _blocks(page):
        path = re.match(r"# ([\w/]+\.py)$", block, flags=re.MULTILINE)
        if language == "python" and path:
            (folder / path[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / path[1]).write_text(block)
        elif language == "python":
            _run([sys.executable, "-c", block], folder=folder, code=0, shown=block)
        for command in _commands(block) if language == "bash" else ():
            code = next((code for part, code in EXIT_CODES.items() if part in command), 0)
            said = _run(_small(command), folder=folder, code=code, shown=command)
            if "benchmarks/convert.py" in command:
                _check_benchmark(said)
                assert not list((folder / "tmp").iterdir())


def _check_benchmark(said: str) -> None:
    rows = re.findall(r"^\| (\w+) \| [\d.]+ GB \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ GB", said, re.MULTILINE)
    assert rows == ["plain", "import", "export", "transformers"]


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page) and page != "README.md"])
def test_commands_run(page: str, tmp_path: Path):
    hf_models.save("llama", tmp_path / "models" / "llama")
    _run_page(page, tmp_path)


def _main_job(folder: Path) -> str:
    """What `python train.py` printed, on one core.

    It chooses its threads as for a user, who sets none. Two that share two cores with other tests take 5 times as long.
    """
    core = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py")],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.usefixtures("warm_processes")
def test_the_main_job_what_it_prints_and_the_tour(tmp_path: Path):
    """README.md: `python train.py` with no arguments, the commands it prints at its end, then the page's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert f"{NOT_RUN} .venv && .venv/bin/pip install -e . && .venv/bin/python train.py\n" in _blocks("README.md")[0][1]
    said = _main_job(tmp_path)
    (entropy,) = re.findall(r"^unigram entropy of the held-out part: ([\d.]+)", said, flags=re.MULTILINE)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line][-1] < float(entropy) - 0.8

    export, generate = re.findall(r"^  (python .+)$", said, flags=re.MULTILINE)
    _run(_small(export), folder=tmp_path, code=0, shown=export)
    (exported,) = re.findall(r"hf=(\S+)", export)
    of_export = generate.replace(str(tmp_path / "runs" / "tiny"), exported)
    ours, same = (_run(_small(command), folder=tmp_path, code=0, shown=command) for command in (generate, of_export))
    assert ours == same

    # transformers itself continues the prompt with the same text
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer("def ", return_tensors="pt")
    ids = model.generate(**tokens, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).rstrip() == ours.rstrip()

    _run_page("README.md", tmp_path)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    missing = [
        link for link in links if not link.startswith("http") and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert not missing
