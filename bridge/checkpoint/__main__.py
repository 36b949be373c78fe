"""`python -m bridge.checkpoint verify PATH`. Exit codes: 0 as saved, 1 damaged, 2 not a checkpoint or wrong usage."""

import sys

from bridge import platform
from bridge.errors import BridgeError

USAGE = "usage: python -m bridge.checkpoint verify PATH   (a run, its checkpoints directory or one iteration)"


def main(arguments: list[str]) -> int:
    """The exit code; what is wrong with the arguments is one line on stderr."""
    if len(arguments) != 2 or arguments[0] != "verify":
        print(USAGE, file=sys.stderr)
        return 2
    try:
        platform.prepare()  # before megatron-core is imported, whose classes .metadata may name
        from bridge.checkpoint.verify import verify

        return verify(arguments[1])
    except BridgeError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
