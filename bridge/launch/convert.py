"""`python convert.py`, `bridge-convert`: compose conf/convert.yaml and run the mode it names, in this process."""

import sys

from bridge import convert as conversion
from bridge.command_line import INTERRUPTED, guarded
from bridge.config import run_config
from bridge.launch import compose

PATH_KEYS = frozenset({"hf", "megatron", "reference", "report"})
FILE_OPTION = "from_file"


def main() -> None:
    """Entry of convert.py and bridge-convert.

    Exit codes: 0 done, 1 out of tolerance or failed, 2 wrong input or a full disk, 130 Ctrl-C, 143 SIGTERM.
    """
    try:
        sys.exit(guarded(_command))
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _command() -> int:
    sys.argv[1:] = [_with_model_file(argument) for argument in sys.argv[1:]]
    codes = [_convert(job) for job in compose.jobs("convert")]
    return max(codes, default=0)


def _convert(job: compose.Composed) -> int:
    settings = compose.absolute(job.settings, names=PATH_KEYS)
    config = run_config.convert_from_dict(settings)
    return conversion.run(config)


def _with_model_file(argument: str) -> str:
    """`model=FILE.yaml` as the choice of an option of Hydra's group `model`, which is made of that file here."""
    key, _, value = argument.partition("=")
    if key != "model" or not value.endswith((".yaml", ".yml")):
        return argument
    compose.add_option("model", FILE_OPTION, run_config.read_model(value))
    return f"model={FILE_OPTION}"
