"""Defaults for `hydra/sweeper=optuna` (extra `sweep`) that suit training; the command line and YAML override them."""

import os
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

SWEEPER = {
    "max_failure_rate": 1.0,  # a job that fails or ends without a finite loss is a failed trial, not the sweep's end
    "n_jobs": 1,  # trials suggested at a time; Hydra's own launcher runs them one after another in any case
}
# Of the samplers: the same command then suggests the same values again, and so resumes its jobs. A study that is kept
# (hydra.sweeper.storage) goes on instead of beginning again, and with a fixed seed would repeat its first suggestions.
SEED = 1234
# How the sweeper ends when every trial has failed, after running them all; the second with a study that is kept.
NO_TRIAL = ("No trials are completed", "Record does not exist")


def set_defaults() -> None:
    """Change the defaults of the options that hydra-optuna-sweeper, if installed, brings."""
    os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")  # optuna 2.10 is older than SQLAlchemy 2
    OmegaConf.register_new_resolver("seed_of_sweep", lambda storage: SEED if storage is None else None, replace=True)
    Plugins.instance()  # imports the plugins, which store their options
    store = ConfigStore.instance()
    if "optuna.yaml" not in store.list("hydra/sweeper"):
        return
    _change("hydra/sweeper", "optuna.yaml", SWEEPER)
    for sampler in store.list("hydra/sweeper/sampler"):
        _change("hydra/sweeper/sampler", sampler, {"seed": "${seed_of_sweep:${hydra.sweeper.storage}}"})


def _change(group: str, option: str, values: dict[str, Any]) -> None:
    stored = ConfigStore.instance().load(f"{group}/{option}")
    for key in values.keys() & set(stored.node):
        stored.node[key] = values[key]
    name = option.removesuffix(".yaml")
    ConfigStore.instance().store(
        name=name, group=group, node=stored.node, package=stored.package, provider=stored.provider
    )
