"""The main job as a new user runs it: `python train.py` with no arguments, then the commands it prints at its end."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(command: str, folder: Path) -> str:
    """stdout of a command that starts with `python`, run as from the checkout but in `folder`, on one core.

    It chooses its threads as for a user, who sets none. Two that share two cores with other tests take 5 times as long.
    """
    core = {min(os.sched_getaffinity(0))}
    words = [str(ROOT / word) if word in ("train.py", "convert.py") else word for word in shlex.split(command)]
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_default_run_and_the_commands_it_prints(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = run("python train.py", tmp_path)
    (entropy,) = re.findall(r"^unigram entropy of the held-out part: ([\d.]+)", said, flags=re.MULTILINE)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line][-1] < float(entropy) - 0.8

    export, generate = re.findall(r"^  (python .+)$", said, flags=re.MULTILINE)
    run(export, tmp_path)
    (exported,) = re.findall(r"hf=(\S+)", export)
    ours = run(generate, tmp_path).rstrip("\n")
    assert run(generate.replace(str(tmp_path / "runs" / "tiny"), exported), tmp_path).rstrip("\n") == ours

    # transformers itself continues the prompt with the same text
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer("def ", return_tensors="pt")
    ids = model.generate(**tokens, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).rstrip() == ours.rstrip()
