"""checkpoint.save_hf: every checkpoint becomes a Hugging Face directory RUN_DIR/hf/iter_0000100, beside training.

A process of low priority without a GPU reads the finished checkpoint, one at a time, as `convert.py mode=export` does:
`python -m bridge.training.hf_exports ITERATION_DIRECTORY HF_DIRECTORY`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bridge.errors import BridgeError
from bridge.processes import die_with_parent, of_child
from bridge.runs import run_files

LOG = "hf_export.log"
LOWEST_PRIORITY = 19
# What makes a process one of several, or shows it a GPU.
_NOT_PASSED_ON = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HIDE_GPUS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class HfExports:
    """The exports of one run, by rank 0. failures: a line for each that did not work."""

    def __init__(self, run_dir: Path) -> None:
        self.target, self._log = run_dir / run_files.HF, run_dir / run_files.LOGS / LOG
        self.failures: list[str] = []
        self._waiting: list[Path] = []
        self._running: tuple[Path, subprocess.Popen[bytes]] | None = None

    def add(self, checkpoint: Path) -> None:
        """Export an iteration directory when those added before are done."""
        self._waiting.append(checkpoint)
        self.poll()

    def catch_up(self, checkpoint: Path) -> None:
        """Export the one a run resumes from, if the run was stopped before that was done."""
        if not (self.target / checkpoint.name).is_dir():
            self.add(checkpoint)

    def in_use(self) -> set[str]:
        """Names of the iteration directories that an export reads or will read."""
        running = [] if self._running is None else [self._running[0]]
        return {checkpoint.name for checkpoint in [*running, *self._waiting]}

    def poll(self) -> None:
        """Look after the running export and start the next; does not wait."""
        if self._running is not None and self._running[1].poll() is not None:
            self._end()
        if self._running is None and self._waiting:
            self._start(self._waiting.pop(0))

    def finish(self) -> None:
        """Wait for all."""
        while self._running is not None or self._waiting:
            if self._running is not None:
                self._running[1].wait()
            self.poll()

    def abandon(self) -> None:
        """End the running export, which leaves nothing behind, and forget the others."""
        self._waiting.clear()
        if self._running is not None:
            self._running[1].terminate()
            self._running[1].wait()
            self._running = None

    def retain(self, checkpoints: Path) -> None:
        """Remove the exports of iterations that are no longer in `checkpoints`."""
        for export in self.target.glob("iter_*"):
            if not (checkpoints / export.name).is_dir():
                shutil.rmtree(export)

    def _start(self, checkpoint: Path) -> None:
        passed_on = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        environment = of_child(passed_on | _HIDE_GPUS)
        command = [sys.executable, "-m", __name__, str(checkpoint), str(self.target / checkpoint.name)]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._running = (checkpoint, process)

    def _end(self) -> None:
        assert self._running is not None
        checkpoint, process = self._running
        self._running = None
        target = self.target / checkpoint.name
        if process.returncode == 0:
            print(f"exported {target}", flush=True)
            return
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        why = next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
        self.failures.append(f"checkpoint.save_hf: {target} was not written ({why}); see {self._log}")
        print(self.failures[-1], file=sys.stderr, flush=True)


def main(checkpoint: str, target: str) -> int:
    """Export one iteration directory; the exit code."""
    os.nice(LOWEST_PRIORITY)
    from bridge import convert
    from bridge.config.schema import ConvertConfig

    Path(target).parent.mkdir(parents=True, exist_ok=True)
    # One process: the cores are the training's. overwrite: of an iteration that was trained again after a fall-back.
    overwrite = Path(target).is_dir()
    try:
        return convert.run(ConvertConfig("export", hf=target, megatron=checkpoint, workers=1, overwrite=overwrite))
    except BridgeError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(*sys.argv[1:]))
