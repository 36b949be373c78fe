"""Defaults for `hydra/sweeper=optuna` (extra `sweep`) that suit training; the command line and YAML override them."""

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

SWEEPER = {
    "max_failure_rate": 1.0,  # a job that fails or ends without a finite loss is a failed trial, not the sweep's end
    "n_jobs": 1,  # trials suggested at a time; Hydra's own launcher runs them one after another in any case
}
SEED = 1234  # of the samplers: the same command then suggests the same values again, and so resumes its jobs


def set_defaults() -> None:
    """Change the defaults of the options that hydra-optuna-sweeper, if installed, brings."""
    Plugins.instance()  # imports the plugins, which store their options
    store = ConfigStore.instance()
    if "optuna.yaml" not in store.list("hydra/sweeper"):
        return
    _change("hydra/sweeper", "optuna.yaml", SWEEPER)
    for sampler in store.list("hydra/sweeper/sampler"):
        _change("hydra/sweeper/sampler", sampler, {"seed": SEED})


def _change(group: str, option: str, values: dict[str, Any]) -> None:
    stored = ConfigStore.instance().load(f"{group}/{option}")
    for key in values.keys() & set(stored.node):
        stored.node[key] = values[key]
    name = option.removesuffix(".yaml")
    ConfigStore.instance().store(
        name=name, group=group, node=stored.node, package=stored.package, provider=stored.provider
    )
