"""What every command line of the project has in common: one line for a mistake, quiet when its reader leaves."""

import argparse
import atexit
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from bridge.errors import BridgeError, ConfigError, RunError, did_you_mean
from bridge.processes import skip_last_collection

DONE, FAILED, INVALID = 0, 1, 2
INTERRUPTED = 130  # what shells report after SIGINT
FULL_ERROR = "HYDRA_FULL_ERROR"  # variable with which Hydra's users ask for tracebacks of their own mistakes: 1
UNRECOGNIZED = "unrecognized arguments: "  # argparse's own words


def guarded(command: Callable[[], int], *, only_prints: bool = False) -> int:
    """Run a command line; its exit code. One line on stderr, and 2 for the user's mistake, 1 for the machine's failure.

    When who read stdout left (`| head`): 1 and a line that says so; 0 and not a word for a command that `only_prints`.
    """
    atexit.register(skip_last_collection)
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can be dealt with
    except BridgeError as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exception(error)
        print(" ".join(str(error).splitlines()), file=sys.stderr, flush=True)
        return INVALID
    except RunError as error:
        print(error, file=sys.stderr, flush=True)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
        if only_prints:
            return DONE
        print("standard output was closed by its reader; stopping", file=sys.stderr, flush=True)
        return FAILED


class Parser(argparse.ArgumentParser):
    """argparse's, whose --help is as ever and whose errors are a ConfigError: one line without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments, with the nearest flag for one that is unknown."""
        hint = ""
        if message.startswith(UNRECOGNIZED):
            unknown = message.removeprefix(UNRECOGNIZED).split()[0].partition("=")[0]
            hint = did_you_mean(unknown, self._option_string_actions)
        raise ConfigError(f"{self.prog}: {message}{hint or '; see --help'}")
