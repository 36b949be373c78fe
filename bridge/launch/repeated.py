"""Two overrides of one key in a sweep: both hold, in their order, as in a single run.

Hydra's sweepers keep overrides by key, so that of `train={steps: 2}` and `train={global_batch_size: 4}` the first was
gone, and Optuna's puts what varies before what does not.
"""

from collections.abc import Sequence
from itertools import combinations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from omegaconf import DictConfig, OmegaConf, open_dict

from bridge.errors import ConfigError


def check(arguments: Sequence[str]) -> None:
    """ConfigError when one of the overrides `arguments` varies a key that a later one sets, too."""
    for first, second in combinations(OverridesParser.create().parse_overrides(list(arguments)), 2):
        if first.is_sweep_override() and _both_set(first, second):
            raise ConfigError(
                f"{second.key_or_group}: is given by '{second.input_line}' after '{first.input_line}', which varies; "
                f"write them the other way round, or leave one of the two out"
            )


def take_from_sweeper(config: DictConfig) -> None:
    """Move the overrides with one value that share a key with others out of the sweeper's arguments in `config`.

    `config` is the master configuration of a sweep. Hydra applies its `hydra.overrides.hydra` to every job first.
    """
    overrides = config.hydra.overrides
    lines = OmegaConf.to_container(overrides.task, resolve=False)  # ${...} is each job's own to fill in
    assert isinstance(lines, list)
    parsed = OverridesParser.create().parse_overrides([str(line) for line in lines])
    pairs = [pair for pair in combinations(parsed, 2) if _share_a_key(*pair)]
    shared = [override for override in parsed if any(override in pair for pair in pairs)]
    taken = [str(override.input_line) for override in shared if not override.is_sweep_override()]
    overrides.hydra.extend(taken)
    overrides.task = [line for line in lines if line not in taken]
    params = config.hydra.sweeper.get("params")
    if params:
        with open_dict(params):
            for key in {override.key_or_group for override in shared} & set(params):
                del params[key]  # the command line comes after it


def _share_a_key(first: Override, second: Override) -> bool:
    short, long = sorted((first, second), key=lambda override: len(override.key_or_group))
    if short.key_or_group == long.key_or_group:
        return True
    return long.key_or_group.startswith(f"{short.key_or_group}.") and not _is_choice(short)


def _both_set(first: Override, second: Override) -> bool:
    """Whether they share a key and neither is a choice of a group, which goes before all that is set."""
    same_key = first.key_or_group == second.key_or_group
    return _share_a_key(first, second) and (not same_key or _is_choice(first) == _is_choice(second))


def _is_choice(override: Override) -> bool:
    """Whether its values are plain text, as options of a group are."""
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return isinstance(value, Glob) or all(isinstance(item, str | QuotedString) for item in values)
