"""`python -m bridge.launch.elastic RUN_DIR ARGUMENTS`: torchrun, which also puts on file which ranks were killed.

A rank that the kernel killed cannot say so itself, and only its parent is told.
"""

import os

from bridge.processes import die_with_parent, of_child

if __name__ == "__main__":
    die_with_parent()
    os.environ.update(of_child(os.environ))  # for the ranks

import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from bridge.runs.result import EXIT_CODES, Result, killed, write_rank_error


def main() -> None:
    """Run torchrun with the arguments after RUN_DIR. Exit code 1 when a rank failed."""
    run_dir = Path(sys.argv[1])
    try:
        run.main(sys.argv[2:])
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # that one comes from the driver
                # A rank aborts itself when it has lost a peer; any other signal came first, and the rest followed.
                at = failure.timestamp if -failure.exitcode == signal.SIGABRT else 0.0
                result = Result("failed", error=killed(rank, -failure.exitcode))
                write_rank_error(result, run_dir, rank=rank, at=at)
        sys.exit(EXIT_CODES["failed"])


if __name__ == "__main__":
    main()
