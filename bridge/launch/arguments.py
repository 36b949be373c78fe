"""The command line before Hydra reads it: flags first wherever they stand, sweeps of hydra.sweeper.params as overrides.

Hydra takes flags only before the first override or after the last, and cannot set hydra.sweeper.params.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, Sweep, ValueType
from hydra.errors import HydraException

from bridge.config import known_keys
from bridge.errors import ConfigError
from bridge.launch import hints

GIVEN_ONCE = ("--config-dir", "--config-path", "--config-name", "hydra.searchpath")  # Hydra takes one and is silent
_SHORT = {"-cd": "--config-dir", "-cp": "--config-path", "-cn": "--config-name"}
SLOTS = ("recipe", "experiment")  # groups of the defaults list without an option: '+' may stand before their names
_PARAMS = "hydra.sweeper.params"


def normalised(arguments: Sequence[str], primary: str) -> list[str]:
    """`arguments` as Hydra understands them, of the same meaning.

    Raises ConfigError for what is no flag of Hydra's, and for no value where conf/<primary>.yaml needs one.
    """
    flags, overrides = _split(arguments, primary)
    for argument in overrides:
        _check_value(argument, primary)
    params = [argument for argument in overrides if argument.lstrip("+").startswith(_PARAMS)]
    others = [_without_plus(argument) for argument in overrides if argument not in params]
    return [*flags, *(override for argument in params for override in _swept(argument)), *others]


def _check_value(argument: str, primary: str) -> None:
    """ConfigError for no value, or for numbers where the key takes a text."""
    key, equals, value = argument.partition("=")
    key = key.lstrip("+")
    if not equals or (value and value[0] not in "+-.0123456789"):
        return
    kind = known_keys.of_command(primary).get(key)
    if kind is not None and not value and not known_keys.is_text(kind):
        raise ConfigError(f"{key}: has no value; write {key}=VALUE")
    if kind is not None and value and known_keys.is_text(kind) and _are_numbers(argument):
        raise ConfigError(
            f"{key}: '{value}' is read as a number or several; write {hints.quoted(key, value)} for a text"
        )


def _are_numbers(argument: str) -> bool:
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return False
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return all(isinstance(item, int | float) for item in values)


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """The overrides among `arguments` of the form key=value."""
    return [argument for argument in arguments if "=" in argument and not argument.startswith("-")]


def _split(arguments: Sequence[str], primary: str) -> tuple[list[str], list[str]]:
    """Flags with their values, and the rest."""
    typed = [_SHORT.get(argument, argument.partition("=")[0]) for argument in arguments]
    for name in GIVEN_ONCE:
        if typed.count(name) > 1:
            raise ConfigError(f"{name}: is given twice; give it once (further directories: 'hydra.searchpath=[A,B]')")
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    for argument in arguments:
        if argument.partition("=")[0] == "--config":
            _refuse_config_file(argument, arguments)
    values, rest = parser.parse_known_intermixed_args(list(arguments))
    overrides = values.overrides
    unknown = [argument for argument in [*rest, *overrides] if argument.startswith("-")]
    if unknown:
        name = unknown[0].partition("=")[0]
        value = _value_of(unknown[0], arguments)
        raise ConfigError(f"{name}: no such flag{hints.of_flag(name, value, known_keys.of_command(primary))}")
    return _written(vars(values)), overrides


def _written(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        if name != "overrides" and value not in (None, False):
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message.removeprefix('argument ')}; --hydra-help lists all flags")


def _value_of(flag: str, arguments: Sequence[str]) -> str:
    """What follows an unknown flag, after '=' or as an argument of its own; or an empty string."""
    if "=" in flag:
        return flag.partition("=")[2]
    following = arguments[arguments.index(flag) + 1 :][:1]
    return following[0] if following and not following[0].startswith("-") and "=" not in following[0] else ""


def _refuse_config_file(flag: str, arguments: Sequence[str]) -> NoReturn:
    file = Path(_value_of(flag, arguments) or "DIR/NAME.yaml")
    raise ConfigError(
        f"--config: no such flag; write --config-dir {file.parent} --config-name {file.stem}, with `defaults: [train, "
        f"_self_]` as the first line of the file"
    )


def _without_plus(argument: str) -> str:
    return argument[1:] if argument.startswith(tuple(f"+{slot}=" for slot in SLOTS)) else argument


def _swept(argument: str) -> list[str]:
    """`hydra.sweeper.params={KEY: VALUES}` or `hydra.sweeper.params.KEY=VALUES` as KEY=VALUES.

    Hydra cannot set them on the command line: params is null, and its keys have dots.
    """
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return [argument]  # Hydra says what is wrong with it
    value, inner = override.value(), override.key_or_group.removeprefix(_PARAMS).removeprefix(".")
    if inner:
        return [f"{inner}={value if isinstance(value, str) else override.get_value_string()}"]
    if not isinstance(value, dict):
        return [argument]
    return [f"{key}={_text(str(key), item)}" for key, item in value.items()]


def _text(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sweep):
        raise ConfigError(
            f"{_PARAMS}: several values for {key} need quotes inside {{...}}; write -m {key}=VALUES instead"
        )
    return Override(OverrideType.CHANGE, "", ValueType.ELEMENT, value).get_value_element_as_str()
