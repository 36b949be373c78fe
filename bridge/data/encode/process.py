"""A process that encodes: `python -m bridge.data.encode.process SOCKET`, started by `sharding`.

Gets a `Job`, then texts or rows with the prefix of the shard to make of them; answers with what it made, or why not.
"""

from bridge.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from bridge.data.encode.sharding import Job
from bridge.errors import BridgeError, RunError


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too, and ends this process
    with Connection(int(sys.argv[1])) as parent:
        job: Job = parent.recv()
        work = job.start()
        while True:
            try:
                prefix, items = parent.recv()
            except (EOFError, ConnectionError):  # it is done, or was killed
                return
            try:
                answer: Any = work(prefix, items)
            except (BridgeError, RunError, OSError) as error:  # what the parent tells in one line
                answer = error
            parent.send(answer)


if __name__ == "__main__":
    main()
