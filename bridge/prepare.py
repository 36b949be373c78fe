"""`python -m bridge.prepare data=... [more overrides of train.py]`: make a run's data ahead, where no GPU is needed.

The run with the same overrides finds it. Exit codes: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C. What is done is kept.
"""

import os
import sys

from bridge import platform
from bridge.command_line import DONE, FAILED, guarded
from bridge.errors import RunError
from bridge.launch import compose, driver, inputs

INTERRUPTED = 130


def main() -> int:
    """Entry of `python -m bridge.prepare`; returns the exit code. With -m the data of every job is made."""
    sys.path.append(os.getcwd())  # where a user's own modules lie, as for train.py
    return guarded(_command)


def _command() -> int:
    configs = [driver.config_of(job) for job in compose.jobs("train")]
    for config in configs:
        inputs.check(config, in_queue=True)  # what the run needs besides is elsewhere
    platform.prepare()  # before megatron-core is imported
    from bridge.training.setup import prepare_data

    try:
        for config in configs:
            prepared = prepare_data(config).prepared
            print(f"data: ready in {prepared.directory}" if prepared.directory else "data: nothing to make", flush=True)
    except RunError as error:
        print(error, file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        print("SIGINT: stopped; what is tokenised is kept", file=sys.stderr, flush=True)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
