"""Entry of `python -m bridge.generate`. Exit codes: 0, or 2 with one line for a mistake, most of them before torch."""

import sys
from collections.abc import Sequence

from bridge.command_line import DONE, guarded
from bridge.generate import options

HELP = frozenset({"--help", "-h"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the prompt and its continuation, or with --help what can be set; the exit code."""
    return guarded(lambda: _command(sys.argv[1:] if arguments is None else arguments), only_prints=True)


def _command(arguments: Sequence[str]) -> int:
    if not HELP.isdisjoint(arguments):
        print(options.help_text())
        return DONE
    chosen = options.parse(arguments)
    options.check_directory(chosen.path)
    from bridge import parallel
    from bridge.generate.decoding import continue_text  # imports torch

    with parallel.single_process():
        print(continue_text(chosen))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
