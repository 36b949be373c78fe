"""`bridge.train` and `bridge.compose`: what train.py does, called from Python, as in a notebook.

Each call is a process of its own that does what the command would, so that Hydra's state, signal handlers, sys.argv and
the environment of the caller stay as they are, calls can follow one another, and an event loop may be running.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.command_line import INTERRUPTED
from bridge.config.run_config import RunConfig
from bridge.errors import BridgeError, ConfigError, RunError
from bridge.launch import early
from bridge.processes import die_with_parent, of_child, python_path
from bridge.runs import run_files
from bridge.training.environment import COMMAND


@dataclass(frozen=True)
class Outcome:
    """What a call of `train` came to. status: done; stopped: saved, the same call goes on; submitted: left to Slurm.

    eval_loss: the last evaluation's, in nats per token. step and eval_loss are None where there are none.
    """

    status: str
    step: int | None
    eval_loss: float | None
    run_dir: Path

    @property
    def metrics(self) -> Path:
        """The run's metrics.jsonl: one JSON object per step, evaluation or save."""
        return self.run_dir / run_files.METRICS


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> RunConfig:
    """The configuration that `python train.py OVERRIDES` would train, checked; torch is not imported.

    config_dir: a directory of groups and recipes of your own, as --config-dir. Raises ConfigError with the line that
    the command would print.
    """
    config: RunConfig = _ask("compose", overrides, config_dir)
    return config


def train(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Outcome:
    """Do what `python train.py OVERRIDES` does, its output shown by print; returns when it has ended.

    The same call resumes the run. An interrupt (Ctrl-C, the notebook's stop button) saves and stops, a second one stops
    at once. Raises ConfigError for wrong input, RunError when the run failed, with the line that the command would
    print.
    """
    outcome: Outcome = _ask("train", overrides, config_dir)
    return outcome


def _ask(action: str, overrides: Sequence[str], config_dir: str | Path | None) -> Any:
    """What `main` answers in a process of its own, which ends with this one."""
    words = [overrides] if isinstance(overrides, str) else list(overrides)
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"overrides: {word!r} is a flag; run sweeps (-m) as `python train.py -m ...` in a shell")
    flags = [] if config_dir is None else ["--config-dir", str(Path(config_dir).expanduser().absolute())]
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as answers:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, action, str(writing), *flags, *words],
            env=of_child(os.environ | {"PYTHONPATH": python_path(), COMMAND: f"bridge.{action}({words!r})"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[writing],
            start_new_session=True,  # an interrupt reaches this process only, which passes it on
        )
        os.close(writing)
        interrupted = _shown(process)
        answer = answers.read()
    if not answer:
        if interrupted:
            raise KeyboardInterrupt
        raise RunError(f"bridge.{action}: its process ended with exit code {process.returncode}; see what it printed")
    found = pickle.loads(answer)
    if isinstance(found, Exception):
        raise found
    return found


def _shown(process: "subprocess.Popen[str]") -> bool:
    """Print what `process` writes until it has ended, and pass interrupts on; whether there was one."""
    interrupted = False
    assert process.stdout is not None
    while True:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
            process.wait()
            process.stdout.close()
            return interrupted
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)


def main() -> None:
    """`python -m bridge.launch.notebook ACTION DESCRIPTOR ARGUMENTS`: answers on a file descriptor."""
    die_with_parent()
    action, descriptor, *typed = sys.argv[1:]
    sys.argv[1:] = typed
    try:
        if action == "train":
            early.start(typed)
        answer = _answer(action)
    except BridgeError as error:
        answer = type(error)(" ".join(str(error).splitlines()))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        early.end()
    with os.fdopen(int(descriptor), "wb") as answers:
        answers.write(pickle.dumps(answer))


def _answer(action: str) -> Any:
    from bridge.launch import compose, driver

    found: list[Any] = []

    def job(composed: compose.Composed) -> float | None:
        config = driver.config_of(composed)
        if action == "compose":
            found.append(config)
            return None
        result = driver.train(composed)
        if result.traceback is not None:
            print(result.traceback, end="", flush=True)
        if result.status in ("failed", "invalid"):
            found.append((RunError if result.status == "failed" else ConfigError)(result.error))
            raise compose.FailedTrial(result.error)
        found.append(Outcome(result.status, result.step, result.eval_loss, config.run_dir))
        return result.objective

    with suppress(compose.FailedTrial):  # which told Hydra's callbacks
        compose.run("train", job, check_points=_refuse_sweep)
    return found[0]


def _refuse_sweep(points: Sequence[Any]) -> bool:
    raise ConfigError(f"overrides: a sweep of {len(points)} jobs; run it as `python train.py -m ...` in a shell")


if __name__ == "__main__":
    # Under the name that the caller knows its classes by: they are pickled.
    from bridge.launch import notebook

    notebook.main()
