"""With init.path no model= is needed: the model is the one in that directory, and model.KEY= says what is different.

The model that conf/train.yaml chooses for a start without weights gives way while Hydra composes, so that --cfg job, a
dry run, a plan and the jobs of a sweep are about the same model.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bridge.errors import ConfigError, shown
from bridge.files import read_yaml
from bridge.runs import run_files
from bridge.runs.claim import latest_step
from bridge.sources.same import differences, told_section
from bridge.weights import locate
from bridge.weights.pointer import iteration_of

WITHOUT_INIT = "tiny"  # what conf/train.yaml chooses
_ASK = "choose model=NAME of conf/model, or write its `model` section to {file}"
_NOT_A_NAME = ("checkpoints", "hf", "best")  # directories inside a run, after which no other is called


@functools.cache
def take_from_now_on(conf: Path) -> None:
    """From now on Hydra composes the model of init.path. conf: the directory of train.yaml."""
    loading: Any = ConfigLoaderImpl.load_configuration

    def load_configuration(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        composed: DictConfig = loading(self, *args, **kwargs)
        path = _path(composed)
        if path is not None:
            _fill(composed, path, without_init=read_yaml(conf / "model" / f"{WITHOUT_INIT}.yaml"))
        return composed

    loader: Any = ConfigLoaderImpl
    loader.load_configuration = load_configuration


def _path(composed: DictConfig) -> Path | None:
    """init.path, where nobody has chosen a model."""
    if "init" not in composed or any(override.startswith("model=") for override in _typed(composed)):
        return None
    if composed.hydra.runtime.choices.get("model") not in (WITHOUT_INIT, None):
        return None
    try:
        path = OmegaConf.select(composed, "init.path")
    except OmegaConfBaseException:  # for the job to tell
        return None
    return Path(path).expanduser().absolute() if isinstance(path, str) and path else None


def _typed(composed: DictConfig) -> list[str]:
    """The overrides, without the signs that may stand before a key."""
    overrides = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)  # as typed: with ${...}
    assert isinstance(overrides, list)
    return [str(override).lstrip("+~") for override in overrides]


def _fill(composed: DictConfig, path: Path, *, without_init: Mapping[str, Any]) -> None:
    typed = {override.partition("=")[0] for override in _typed(composed)}
    composed_model: Any = OmegaConf.to_container(composed.model, resolve=False)
    given: dict[str, Any] = {
        str(name): node
        for name, node in composed_model.items()
        if f"model.{name}" in typed or name not in without_init or without_init[name] != node
    }
    composed.hydra.runtime.choices["model"] = name_after(path)  # after which the run is called
    base = _of_run(composed)
    if base is None and not (path.exists() or composed.launch.check_paths):
        raise ConfigError(
            f"init.path: {path} is not on this machine (launch.check_paths=false), so that its model is not known; "
            "choose model=NAME of conf/model"
        )
    base = base or section_of(path, given)
    merged: Any = {**base, **given}
    with open_dict(composed):
        composed.model = DictConfig(merged, flags={"struct": False})
    _check_given(given, base, OmegaConf.to_container(composed.model, resolve=True), path=path)


def name_after(path: Path) -> str:
    """from_qwen of models/qwen, from_demo of runs/demo and all that lies in it."""
    names = [part for part in path.parts[1:] if part not in _NOT_A_NAME and iteration_of(Path(part)) is None]
    return "from_" + re.sub(r"[^\w.+-]", "_", names[-1] if names else "weights")


def section_of(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a model directory of either kind. given: keys that the user sets.

    Raises ConfigError naming init.path, ConversionError.
    """
    section = told_section(path, key="init.path", family=given.get("family"))
    if section is not None:
        return section
    found = locate.locate(path, key="init.path")
    from bridge.sources.described import model_of

    ask = _ASK.format(file=found.root / locate.MODEL_YAML)
    return model_of(found, model=given or None, key="init.path", ask=ask).section


def _of_run(composed: DictConfig) -> dict[str, Any] | None:
    """The `model` section of a run that goes on: whatever is in init.path by now."""
    if composed.eval_only:
        return None
    run_dir = Path(str(composed.runs_dir)) / str(composed.name)
    if latest_step(run_dir) is None or not (run_dir / run_files.CONFIG).is_file():
        return None
    section = read_yaml(run_dir / run_files.CONFIG).get("model")
    return section if isinstance(section, dict) else None


def _check_given(given: Mapping[str, Any], base: Mapping[str, Any], model: Any, *, path: Path) -> None:
    """Raise ConfigError for what is said to be different and would be another model."""
    wrong = [one for one in differences(base, model) if one.name in given]
    if wrong:
        said = ", ".join(f"model.{one.name} is {shown(one.ours)} (there {shown(one.theirs)})" for one in wrong)
        raise ConfigError(f"{said}: not the model in {path}; leave that out: the model is that of init.path")
