"""`python -m tests.warm.server FD ___`: imports, and is then the twin of the process at the other end of socket FD."""

import gc
import importlib
import os
import socket
import sys

from tests.warm import twin


def preload() -> None:
    """Import what commands and workers import. Imports only: a tensor operation could start threads."""
    importlib.import_module("tests.preload")  # first of all: it adapts megatron-core

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import bridge.api.models
    import bridge.convert
    import bridge.generate
    import bridge.launch.convert
    import bridge.launch.driver
    import bridge.launch.elastic
    import bridge.launch.worker
    import bridge.training.run  # noqa: F401


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    twin.remember_start()
    gc.disable()
    preload()
    gc.freeze()
    gc.enable()
    with open("/proc/self/status") as status:
        threads = next(line.split()[1] for line in status if line.startswith("Threads:"))
    assert threads == "1", f"{threads} threads: a fork would lose them"
    order, descriptors = twin.serve(channel)
    twin.become(order, descriptors)


if __name__ == "__main__":
    # The module itself, not this copy called __main__: the forks replace __main__ by what they run.
    from tests.warm import server

    server.main()
