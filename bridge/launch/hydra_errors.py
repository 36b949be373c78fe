"""Hydra's and OmegaConf's errors as one line: `<full key>: <what is wrong, with the value>; <what to set instead>`.

Hydra's own texts span lines and advise '+key', which would only move the mistake past Hydra.
"""

import re
import traceback
from collections.abc import Iterable

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from bridge.errors import did_you_mean

_COMPOSING = ("config_loader_impl.py", "defaults_list.py", "config_repository.py")


def of_the_users(error: Exception) -> bool:
    """Whether the command line or a file is at fault for Hydra's `error`: always, unless it comes from a launcher."""
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError | ValueError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    composing = any(frame.filename.endswith(_COMPOSING) for frame in frames)
    return composing or not any(frame.name == "launch" for frame in frames)


def one_line(error: Exception, *, arguments: Iterable[str] = ()) -> str:
    """One line for `error`, raised while Hydra composed the command line `arguments`."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a valid override, {_first_line(error.message)}; write key=value or group=option"
    if isinstance(error, MissingConfigException):
        return _missing_file(error)
    if isinstance(error, ConfigCompositionException):
        return _composition(error, list(arguments))
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}: line {mark.line + 1} is not valid YAML, {error.problem}"
    if not isinstance(error, HydraException | ValueError):  # Hydra and OmegaConf fail on some values without a word
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
        return f"{_override_at(error)}: cannot be composed ({type(error).__name__}: {_first_line(said)})"
    return _first_line(str(error))


def _override_at(error: Exception) -> str:
    """The override that was being applied when `error` was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    applied = [frame.f_locals["override"] for frame in frames if frame.f_code.co_name == "_apply_overrides_to_config"]
    return applied[-1].input_line if applied else "configuration"


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("See https://", "Error parsing override", "To append"))]
    return (useful or lines or ["unknown error"])[0]


def _missing_file(error: MissingConfigException) -> str:
    missing = error.missing_cfg_file
    if missing is None:
        return _first_line(str(error))
    group, _, option = str(missing).rpartition("/")
    if not group:
        return f"{option}: no such configuration file; see --config-dir and --config-name"
    if (group, option) == ("hydra/sweeper", "optuna"):
        return f"{group}: '{option}' needs a package that is missing; pip install 'bridge[sweep]'"
    known = [str(name) for name in error.options or []]
    choices = f"; the options are {', '.join(sorted(known))}" if known else ""
    return f"{group}: no option '{option}'{did_you_mean(option, known) or choices}"


def _composition(error: ConfigCompositionException, arguments: list[str]) -> str:
    text, cause = str(error), error.__cause__
    quoted = re.search(r"'([^']*)'", text)
    name = quoted.group(1) if quoted else ""
    if text.startswith("Could not override"):
        return _unknown_key(name, cause, arguments)
    if text.startswith(("Ambiguous value for argument", "Sweep parameters")):
        key, _, value = name.partition("=")
        return f"{key}: '{value}' gives one run several values; write [a,b] for a list, or add -m to run them all"
    if text.startswith("Could not append to config"):
        argument = next((a for a in arguments if a.startswith(f"+{name}=")), f"+{name}=...")
        return f"{name}: is already set, so '{argument}' adds nothing; write it without the '+'"
    twice = re.match(r"Multiple values for (\S+?)\. |(\S+) appears more than once", text)
    if twice:
        group = twice.group(1) or twice.group(2)
        return f"{group}: is chosen twice; write {group}=option without a '+'"
    if text.startswith("Could not delete from config"):
        return f"{name}: cannot be deleted, it does not exist"
    if isinstance(cause, OmegaConfBaseException):
        return _omegaconf(cause)
    return _first_line(text)


def _unknown_key(name: str, cause: BaseException | None, arguments: list[str]) -> str:
    parent, *_ = name.rpartition(".")
    known: list[str] = []
    if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig):
        node = cause.parent_node
        parent = str(node._get_full_key(None) or "")
        known = [str(key) for key in node]
    rest = name.removeprefix(f"{parent}.") if parent else name
    hint = did_you_mean(rest.split(".")[0], known)
    if hint and parent:
        hint = hint.replace("'", f"'{parent}.", 1)
    argument = next((a for a in arguments if a.split("=")[0] == name), name)
    kind = "group or key" if "." not in name else "key"
    return f"{name}: no such {kind} ({argument}){hint}"


def _omegaconf(error: OmegaConfBaseException) -> str:
    key = error.full_key or "configuration"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no value; set {key}=..."
    return f"{key}: {_first_line(error.msg or str(error))}"
