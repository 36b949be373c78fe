"""Hydra's and OmegaConf's errors as one line: `<full key>: <what is wrong, with the value>; <what to set instead>`.

Hydra's own texts span lines and advise '+key', which would only move the mistake past Hydra.
"""

import re
import traceback
from collections.abc import Sequence
from itertools import pairwise

from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from bridge.config import known_keys
from bridge.errors import did_you_mean
from bridge.launch import arguments, hints, slurm

_COMPOSING = ("config_loader_impl.py", "defaults_list.py", "config_repository.py", "hydra/core/utils.py")


def of_the_users(error: Exception) -> bool:
    """Whether the command line or a file is at fault for Hydra's `error`: always, unless it comes from a launcher.

    Of a launcher's it is when sbatch refuses the job.
    """
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError | ValueError):
        return True
    if slurm.is_refused_by_sbatch(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    composing = any(frame.filename.endswith(_COMPOSING) for frame in frames)
    return composing or not any(frame.name == "launch" for frame in frames)


def one_line(error: Exception, *, typed: Sequence[str] = (), primary: str = "train") -> str:
    """One line for `error`, raised while Hydra composed conf/<primary>.yaml and the command line `typed`."""
    if slurm.is_refused_by_sbatch(error):
        return slurm.refused_by_sbatch(error)
    if isinstance(error, OverrideParseException):
        return hints.of_unparsed(error.override, _first_line(error.message), known_keys.of_command(primary))
    if isinstance(error, MissingConfigException):
        return _missing_file(error, typed, primary)
    if isinstance(error, ConfigCompositionException):
        return _composition(error, typed, primary)
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}: line {mark.line + 1} is not valid YAML, {error.problem}"
    if isinstance(error, UserWarning):
        return f"hydra.searchpath: no directory '{str(error).partition('path=')[2].removesuffix(' is not available.')}'"
    if str(error).startswith("Config group override must be"):
        return _no_name(typed)
    if not isinstance(error, HydraException | ValueError):  # Hydra and OmegaConf fail on some values without a word
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
        applied = _applied(error)
        key = applied[0].input_line if applied else "configuration"
        return f"{key}: cannot be composed ({type(error).__name__}: {_first_line(said)})"
    return _first_line(str(error))


def _applied(error: BaseException) -> tuple[Override, DictConfig] | None:
    """The override that was being applied when `error` was raised, and the configuration it was applied to."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_apply_overrides_to_config":
            return frame.f_locals["override"], frame.f_locals["cfg"]
    return None


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("See https://", "Error parsing override", "To append"))]
    return (useful or lines or ["unknown error"])[0]


def _missing_file(error: MissingConfigException, typed: Sequence[str], primary: str) -> str:
    missing, flags = error.missing_cfg_file, dict(pairwise(typed))
    if missing is None:
        place = flags.get("--config-path")
        return f"--config-path: '{place}' is not a directory" if place else _first_line(str(error))
    if missing.endswith((".yaml", ".yml")):
        group, _, file = missing.partition("/")
        return f"{group}: '{file}' is a file, not an option{hints.of_file(group, file)}"
    group, _, option = str(missing).rpartition("/")
    if not group:
        if "--config-path" in flags:
            directory, name = flags["--config-path"], flags.get("--config-name", primary)
            return (
                f"--config-path: {directory} replaces the shipped files, but has no {option}.yaml; write "
                f"--config-dir {directory} --config-name {name}"
            )
        return f"{option}: no such configuration file; see --config-dir and --config-name"
    known = sorted(str(name) for name in error.options or [])
    return f"{group}: no option '{option}'{hints.of_option(group, option, known)}"


def _composition(error: ConfigCompositionException, typed: Sequence[str], primary: str) -> str:
    text, cause = str(error), error.__cause__
    quoted = re.search(r"'([^']*)'", text)
    name = quoted.group(1) if quoted else ""
    if text.startswith("Could not override"):
        return _unknown_key(name, error, primary)
    if text.startswith(("Ambiguous value for argument", "Sweep parameters")):
        key, _, value = text.partition("'")[2].rpartition("'")[0].partition("\n")[0].rstrip("'").partition("=")
        if text.startswith("Sweep"):
            return f"{key}: '{value}' gives one run several values; add -m to run them all"
        ways = hints.of_values(key, value, known_keys.of_command(primary))
        return f"{key}: '{value}' gives one run several values{ways}"
    if text.startswith("Could not append to config"):
        argument = next((a for a in typed if a.startswith(f"+{name}=")), f"+{name}=...")
        return f"{name}: is already set, so '{argument}' adds nothing; write it without the '+'"
    twice = re.match(r"Multiple values for (\S+?)\. |(\S+) appears more than once", text)
    if twice:
        group = twice.group(1) or twice.group(2)
        return f"{group}: is chosen twice; write {group}=option without a '+'"
    if text.startswith("Could not delete"):
        return _undeleted(name, error)
    if isinstance(cause, OmegaConfBaseException):
        return _omegaconf(cause)
    return _first_line(text)


def _no_name(typed: Sequence[str]) -> str:
    """For an option of a group that reads as a number."""
    choices = [argument.partition("=") for argument in typed if "." not in argument.partition("=")[0]]
    for group, _, option in choices:
        if re.fullmatch(r"[\d.e+-]+|true|false|null", option, re.IGNORECASE):
            return f"{group}={option}: no option of a group{hints.of_option(group, option, []) or '; write its name'}"
    return "a group: its option is not a name; write group=option"


def _undeleted(name: str, error: Exception) -> str:
    applied = _applied(error)
    if applied is None:  # a group
        group = name.partition("=")[0]
        return f"{group}: '~{name}' is not the option that is chosen; write {group}=OPTION for another"
    override, config = applied
    section, _, last = name.rpartition(".")
    node = OmegaConf.select(config, section) if section else config
    if not isinstance(node, DictConfig) or last not in node:
        beside = [str(key) for key in node] if isinstance(node, DictConfig) else []
        hint = hints.of_key(name, None, beside=beside, keys={})
        return f"{name}: cannot be deleted, it does not exist{hint}"
    if node[last] is None:
        return f"{name}: is null already; leave '{override.input_line}' out"
    return (
        f"{name}: is {_first_line(str(node[last]))}, so that '{override.input_line}' deletes nothing; write '~{name}'"
    )


def _unknown_key(name: str, error: Exception, primary: str) -> str:
    cause, applied = error.__cause__, _applied(error)
    parent, beside = name.rpartition(".")[0], list[str]()
    if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig):
        node = cause.parent_node
        parent = str(node._get_full_key(None) or "")
        beside = [str(key) for key in node]
    argument = str(applied[0].input_line) if applied else name
    value = argument.partition("=")[2] or None
    if name in arguments.SLOTS:
        file = value if value and re.fullmatch(r"[\w-]+", value) else "NAME"
        return f"{name}: no option '{value}'; put {name}/{file}.yaml into the directory of --config-dir DIR"
    rest = name.removeprefix(f"{parent}.") if parent else name
    known = known_keys.of_command(primary)
    # a key below one that does not exist: what is near it may be a section
    hint = hints.of_key(name, value, beside=[] if "." in rest else beside, keys=known)
    if not hint and "." in rest:
        hint = did_you_mean(rest.split(".")[0], beside)
    kind = "group or key" if "." not in name else "key"
    return f"{name}: no such {kind} ({argument}){hint}"


def _omegaconf(error: OmegaConfBaseException) -> str:
    key = error.full_key or "configuration"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no value; set {key}=..."
    return f"{key}: {_first_line(error.msg or str(error))}"
