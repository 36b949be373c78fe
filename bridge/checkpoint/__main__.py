"""`python -m bridge.checkpoint verify PATH`. Exit codes: 0 as saved, 1 damaged, 2 not a checkpoint or wrong usage."""

import sys
from collections.abc import Sequence
from pathlib import Path

from bridge import platform
from bridge.checkpoint import files
from bridge.command_line import Parser, guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; what is wrong with the arguments is one line on stderr."""
    return guarded(lambda: _command(arguments))


def _command(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    iterations = files.iterations(Path(options.path).expanduser().absolute())
    platform.prepare()  # before megatron-core is imported, whose classes .metadata may name
    from bridge.checkpoint.intact import verify

    return verify(iterations)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m bridge.checkpoint",
        description="Whether the files of a run's checkpoints are as they were saved, and harmless. "
        "Exit codes: 0 all is well, 1 something is damaged or would run code, 2 wrong input.",
    )
    parser.add_argument("command", choices=["verify"], help="read every file and compare it with its checksum")
    parser.add_argument("path", metavar="PATH", help="a run, its checkpoints directory or one iteration")
    return parser


if __name__ == "__main__":
    sys.exit(main())
