"""What a command names and can be looked at before torch is imported: directories, packages, the machine."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bridge import platform
from bridge.config import modules, sections
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError, shown
from bridge.runs.claim import latest_step
from bridge.sources.same import check_same_model, told_section


def check(config: RunConfig, *, in_queue: bool = False) -> None:
    """Raise ConfigError for the first path, package or setting that would end the run once its workers are up.

    in_queue: a Slurm job trains, elsewhere: its node may have GPUs, and a cache of its own. What it reads must be here
    as there, as the run directory is, unless launch.check_paths is false.
    """
    check_init(config)
    if config.launch.check_paths:
        _check_source(config)
        if not in_queue:
            _check_cache(config.data.get("cache_dir"))
    _check_packages(config)
    if not in_queue and not platform.may_have_gpu():
        routed = config.routed
        platform.check(routed.transformer | routed.ddp | routed.optimizer, routed.origin)


def check_init(config: RunConfig) -> None:
    """Raise ConfigError for weights that are not there, are those of another model, or should not be random.

    Comes before what is said of sizes: those of the model that is chosen by mistake are none of the user's.
    """
    if not (config.dry_run or config.plan or config.eval_only):
        _check_random(config)
    if config.launch.check_paths:
        _check_model(config)


def check_data(config: RunConfig) -> None:
    """Raise ConfigError for the first path that is no model or no data."""
    _check_model(config)
    _check_source(config)


def _check_random(config: RunConfig) -> None:
    """Data that is made for fine-tuning says so by FINE_TUNES = True: random weights learn little from it."""
    if config.init.path is not None or config.init.random or latest_step(config.run_dir) is not None:
        return
    name = config.data["source"]
    if getattr(modules.load("data.source", name, "data"), "FINE_TUNES", False):
        raise ConfigError(
            f"init.path: is not set, and data.source={name} is for fine-tuning; set init.path=DIR to the model to "
            "start from, or init.random=true to train random weights"
        )


def _check_model(config: RunConfig) -> None:
    if config.init.path is None or not (config.eval_only or latest_step(config.run_dir) is None):
        return
    path = Path(config.init.path)
    family = config.routed.family if "." in config.routed.family else None  # a dotted module is the user's own
    section = told_section(path, key="init.path", family=family)
    if section is not None:  # else its tensors tell, to the workers
        check_same_model(section, config.routed, path=path)


def _check_source(config: RunConfig) -> None:
    module: Any = modules.load("data.source", config.data["source"], "data")
    if hasattr(module, "check"):
        module.check(sections.build(module.Config, config.data, "data"))


def _check_cache(cache_dir: str | None) -> None:
    if cache_dir is None:
        return
    path = Path(cache_dir).expanduser().absolute()
    place = next(place for place in (path, *path.parents) if place.exists())
    if not place.is_dir():
        raise ConfigError(f"data.cache_dir: {place} is a file; set a directory you can write to")
    if place != path and not os.access(place, os.W_OK):
        raise ConfigError(f"data.cache_dir: cannot write {place}; set a directory you can write to")


def _check_packages(config: RunConfig) -> None:
    for key, value, package in (
        ("log.tensorboard", config.log.tensorboard or None, "tensorboard"),
        ("log.wandb.project", config.log.wandb.project, "wandb"),
    ):
        if value is not None and find_spec(package) is None:
            raise ConfigError(f"{key}: {shown(value)} needs a package that is missing; pip install {package}")
