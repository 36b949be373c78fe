"""Entry of train.py and bridge-train."""

import sys

from bridge.launch import early


def main() -> None:
    """Start the worker of a likely run, then do what the command line says. Exit codes: `bridge.launch.driver.main`."""
    early.start(sys.argv[1:])
    try:
        from bridge.launch import driver

        driver.main()
    finally:
        early.end()
