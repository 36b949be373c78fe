"""Tokenising as tasks of datatrove, on this machine or in Slurm: `python -m bridge.data.encode.engine`, a pickled Work
on its standard input. A task makes a shard of a part of the files; tasks that are done are not repeated.

In a process of its own, as datatrove starts others by settings of the whole process.
"""

from bridge.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bridge.command_line import INTERRUPTED, guarded
from bridge.errors import ConfigError, RunError, shown
from bridge.processes import of_child, python_path

KEY = "data.engine"
EXECUTORS = ("local", "slurm")
OURS = frozenset({"executor", "pipeline", "logging_dir", "skip_completed", "depends"})
INTERVAL = 5.0  # seconds between two looks at a Slurm job
BATCH = 256  # documents encoded at once

Part = Callable[[int, int], Iterable[str]]  # the texts of part n of N


@dataclass(frozen=True)
class Work:
    """directory: where shards and datatrove's logs go. engine: data.engine."""

    directory: Path
    texts: Part
    tokenizer: Path
    end_of_document: str
    engine: dict[str, Any]


def check(engine: Mapping[str, Any] | None) -> None:
    """Raises ConfigError unless data.engine names an executor and a number of tasks, and datatrove is there."""
    if engine is None:
        return
    if engine.get("executor") not in EXECUTORS:
        known = " or ".join(EXECUTORS)
        raise ConfigError(f"{KEY}.executor: {shown(engine.get('executor'))} is not known; set {known}")
    tasks = engine.get("tasks")
    if not isinstance(tasks, int) or isinstance(tasks, bool) or tasks < 1:
        raise ConfigError(f"{KEY}.tasks: {shown(tasks)} is no number of tasks; set 1 or more, one shard each")
    if find_spec("datatrove") is None:
        raise ConfigError(f"{KEY}: {shown(engine)} needs a package that is missing; pip install datatrove")
    if engine["executor"] == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(f"{KEY}.executor: slurm, but there is no sbatch here; set local")


def write(work: Work) -> list[str]:
    """The prefixes of the shards, in the order of the texts. Raises RunError when a task failed."""
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH")]  # a Slurm job calls one of datatrove's
    environment = os.environ | {
        "PYTHONPATH": python_path(),
        "PATH": os.pathsep.join(filter(None, programs)),
        "TOKENIZERS_PARALLELISM": "false",  # a process each, rather than threads
    }
    command = [sys.executable, "-m", "bridge.data.encode.engine"]
    done = subprocess.run(command, input=pickle.dumps(work), env=of_child(environment))
    if done.returncode:
        raise RunError(
            f"{KEY}: datatrove's tasks failed with exit code {done.returncode}; see {work.directory / 'logs'}; the "
            "same command repeats those that are not done"
        )
    found = sorted(str(path.with_suffix("")) for path in work.directory.glob("*_tokens.idx"))
    return [prefix for prefix in found if os.path.getsize(f"{prefix}.bin")]  # more tasks than files leave empty ones


@dataclass(frozen=True)
class _Documents:
    """The first step of the pipeline."""

    texts: Part

    def __call__(self, _: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from datatrove.data import Document

        for number, text in enumerate(self.texts(rank, world_size)):
            yield Document(text=text, id=f"{rank}/{number}")


def _run() -> int:
    work: Work = pickle.load(sys.stdin.buffer)
    import multiprocess  # datatrove's own copy of multiprocessing
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    multiprocess.set_start_method("forkserver")  # fsspec has started a thread by the time its processes start
    tokenizer = MegatronDocumentTokenizer(
        str(work.directory),
        tokenizer_name_or_path=str(work.tokenizer / "tokenizer.json"),
        eos_token=work.end_of_document,
        batch_size=BATCH,
    )
    kind = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor}[work.engine["executor"]]
    options = {name: value for name, value in work.engine.items() if name not in OURS}
    try:
        executor = kind([_Documents(work.texts), tokenizer], logging_dir=str(work.directory / "logs"), **options)
    except TypeError as error:
        raise ConfigError(f"{KEY}: {error}; set arguments of datatrove's {kind.__name__}") from error
    executor.run()
    if work.engine["executor"] == "slurm":
        _wait(executor)
    return 0


def _wait(executor: Any) -> None:
    """Until all tasks are done. Raises ConfigError when the job ends before. Ctrl-C cancels it."""
    try:
        _look(executor)
    except KeyboardInterrupt:
        subprocess.run(["scancel", str(executor.job_id)])
        sys.exit(INTERRUPTED)


def _look(executor: Any) -> None:
    while missing := len(executor.get_incomplete_ranks(skip_completed=True)):
        queued = subprocess.run(["squeue", "-h", "-j", str(executor.job_id)], capture_output=True, text=True).stdout
        if not queued.strip() and executor.get_incomplete_ranks(skip_completed=True):
            raise ConfigError(f"{KEY}: Slurm job {executor.job_id} ended with {missing} tasks not done; see its logs")
        time.sleep(INTERVAL)


if __name__ == "__main__":
    sys.exit(guarded(_run))
