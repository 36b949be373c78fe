"""`python -m bridge.prepare data=... [more overrides of train.py]`: make a run's data ahead, where no GPU is needed."""

import os
import sys
from collections.abc import Sequence

from bridge import platform
from bridge.command_line import DONE, INTERRUPTED, guarded
from bridge.launch import compose, driver, inputs

HELP = """\
usage: python -m bridge.prepare [group=option ...] [section.key=value ...]
  python -m bridge.prepare init.path=models/mine data=text data.path=texts

Makes the data of the run with these overrides of train.py, which then finds it; no GPU is needed. What is done is kept,
and the same command goes on from there. With -m the data of every job of a sweep.

Exit codes: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m bridge.prepare`; returns the exit code. arguments: in place of those of the process."""
    if arguments is not None:
        sys.argv[1:] = arguments
    sys.path.append(os.getcwd())  # where a user's own modules lie, as for train.py
    return guarded(_command)


def _command() -> int:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(HELP)
        return DONE
    configs = [driver.config_of(job) for job in compose.jobs("train")]
    for config in configs:
        inputs.check(config, in_queue=True)  # what the run needs besides is elsewhere
    platform.prepare()  # before megatron-core is imported
    from bridge.training.setup import prepare_data

    try:
        for config in configs:
            prepared = prepare_data(config).prepared
            print(f"data: ready in {prepared.directory}" if prepared.directory else "data: nothing to make", flush=True)
    except KeyboardInterrupt:
        print("SIGINT: stopped; what is tokenised is kept", file=sys.stderr, flush=True)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
