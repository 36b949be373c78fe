"""`python -m tests.launch.ending RUN_DIR`: in place of a worker, which ends as the next entry of endings.json says."""

import json
import os
import signal
import sys
from pathlib import Path

from bridge.runs.result import Result, write_result


def main() -> None:
    run_dir = Path(sys.argv[1])
    ending, *others = json.loads((run_dir / "endings.json").read_text())
    (run_dir / "endings.json").write_text(json.dumps(others))
    if ending["step"] is not None:
        (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(ending["step"]))
    write_result(Result(**ending["result"]), run_dir)
    if ending["stopping"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getppid(), signal.SIGTERM)  # as a user or Slurm tells the command


if __name__ == "__main__":
    main()
