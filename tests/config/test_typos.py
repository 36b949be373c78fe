"""One wrong letter in any key of any section or group file is refused, with the full key and the value."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from bridge.config import run_config
from bridge.errors import ConfigError, shown
from tests.config.composing import composed

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = ("model", "parallelism", "optimizer", "precision", "peft", "data", "objective")


def options(group: str) -> list[str]:
    return [f"{group}={file.stem}" for file in sorted((CONF / group).glob("*.yaml"))]


# What is composed together: one option of each group, as long as it has more, and a recipe alone.
TOGETHER = [[option for option in row if option] for row in zip_longest(*map(options, GROUPS))]
TOGETHER += [[recipe] for recipe in options("recipe")]


def keys(values: dict[str, Any], *path: str) -> Iterator[tuple[str, ...]]:
    """The full path of every key, sections included."""
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from keys(value, *path, name)


def misspelt(config: dict[str, Any], path: tuple[str, ...], *, keep: bool) -> tuple[dict[str, Any], str, Any]:
    """`config` with the last letter of one key doubled; `keep`: beside the right key, as `+section.typo=` does.

    Only the sections on the way to the key are copies.
    """
    config = section = dict(config)
    for name in path[:-1]:
        section[name] = section = dict(section[name])
    value = section[path[-1]] if keep else section.pop(path[-1])
    wrong = path[-1] + path[-1][-1]
    section[wrong] = value
    return config, ".".join([*path[:-1], wrong]), value


def assert_refused(config: dict[str, Any], path: tuple[str, ...], *, check: Any = run_config.from_dict) -> None:
    for keep in (True, False):
        wrong, key, value = misspelt(config, path, keep=keep)
        with pytest.raises(ConfigError) as caught:
            check(wrong)
        text = str(caught.value)
        assert "\n" not in text
        if keep:
            assert text.startswith(f"{key}: unknown key (value {shown(value)}); "), text
        assert path[-1] in text


def test_every_key_of_the_default_run():
    config = composed()
    for path in keys(config):
        assert_refused(config, path)


@pytest.mark.parametrize("chosen", TOGETHER, ids=" ".join)
def test_every_key_of_every_option(chosen: list[str]):
    needs_path = any("\npath: null" in (CONF / f"{option.replace('=', '/')}.yaml").read_text() for option in chosen)
    config = composed(*chosen, *["data.path=corpus"] * needs_path)
    run_config.from_dict(config)
    groups = [option.partition("=")[0] for option in chosen]
    for section in groups if groups != ["recipe"] else list(config):
        for path in keys(config[section], section) if isinstance(config[section], dict) else ():
            assert_refused(config, path)


def test_every_key_of_a_conversion():
    config = composed("mode=import", "hf=a", "megatron=b", primary="convert")
    for path in keys(config):
        wrong, key, _ = misspelt(config, path, keep=True)
        with pytest.raises(ConfigError, match=f"^{key}: unknown key"):
            run_config.convert_from_dict(wrong)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+train.step=5", "train.step: unknown key (value 5); did you mean 'steps'?"),
        ("++log.wandb.entiti=x", "log.wandb.entiti: unknown key (value x); did you mean 'entity'?"),
        ("model.hiden_size=256", "model.hiden_size: unknown key (value 256); did you mean 'hidden_size'?"),
        ("+trian.steps=5", "trian: unknown key (value {steps: 5}); did you mean 'train'?"),
        ("parallelism.bf16=true", "precision.bf16: is also set as parallelism.bf16 (here true); keep one of the two"),
    ],
)
def test_command_line(override: str, expected: str):
    config = composed(override, "precision=bf16")
    with pytest.raises(ConfigError) as caught:
        run_config.from_dict(config)
    assert str(caught.value) == expected
