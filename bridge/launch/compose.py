"""Command line -> composed configuration, through Hydra. Costs no torch import.

`hydra.main` stays in charge, so --help, --cfg, -m, --config-dir, shell completion, sweepers and launchers behave as
Hydra users expect; around it every error of the user's becomes one ConfigError.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import bridge
from bridge.command_line import FULL_ERROR
from bridge.errors import BridgeError, ConfigError
from bridge.launch import (
    arguments,
    compose_once,
    group_options,
    hydra_keys,
    model_of_init,
    option_files,
    optuna,
    repeated,
    slurm,
    slurm_job,
    tether,
)
from bridge.launch.hydra_errors import of_the_users, one_line

GRID_SWEEPER = "hydra_plugins.bridge_grid.GridSweeper"
# Sections that accept fields no YAML file lists: megatron-core's dataclasses, data sources and adapters check those.
OPEN_SECTIONS = ("model", "parallelism", "optimizer", "precision", "peft", "data", "objective")


class Composed(NamedTuple):
    """One composed job: a single run, or one of a sweep."""

    settings: dict[str, Any]  # plain values, interpolations filled in
    overrides: list[str]  # as typed, without hydra.*; in a sweep with this job's values
    number: int | None = None  # place in the sweep; None in a single run
    swept: tuple[str, ...] = ()  # the overrides that the sweep varies
    directory: Path = Path()  # in a sweep: this job's own, hydra.sweep.dir/hydra.sweep.subdir
    sweep_directory: Path = Path()  # hydra.sweep.dir, as this job's settings have it
    launcher: str = ""  # its class
    slurm: dict[str, Any] | None = None  # with hydra/launcher=slurm: its options
    suggested: bool = False  # by a sweeper that learns from the jobs before, such as Optuna's; not one of a grid


class Point(NamedTuple):
    """One job of a grid before it is launched, or why it cannot be composed."""

    number: int
    swept: tuple[str, ...]
    job: Composed | None = None
    error: ConfigError | None = None


class FailedTrial(Exception):
    """Raised by a job that has nothing to minimise: Hydra's callbacks are told that it failed."""


class _Refused(BaseException):
    """Carries a ConfigError out of a callback: Hydra makes a warning of every Exception there."""


class SweepStart(NamedTuple):
    """Where the jobs of a sweep have their directories, and the time.time() before the first of them."""

    directory: Path
    time: float
    launcher: str  # its class


class NoteSweep(Callback):
    """Set as a callback in conf/train.yaml: with a launcher that runs jobs elsewhere no job tells the driver.

    The last that sees the command line as typed, before a sweeper does; refuses settings of Hydra's own before Hydra
    makes a directory.
    """

    started: SweepStart | None = None
    command: tether.Command | None = None  # with a launcher that runs jobs in processes of its own on this machine

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _refusing(hydra_keys.check_run, config)

    def on_run_end(self, config: DictConfig, job_return: JobReturn | None = None, **kwargs: Any) -> None:
        """The callback that comes first is the last to be told of an end: keep Hydra from a report of its own."""
        if job_return is not None:
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _refusing(hydra_keys.check_sweep, config)
        launcher = str(config.hydra.launcher.get("_target_"))
        NoteSweep.started = SweepStart(Path(os.path.abspath(str(config.hydra.sweep.dir))), time.time(), launcher)
        if not launcher.endswith(hydra_keys.NOT_TIED):
            NoteSweep.command = tether.Command()
        repeated.take_from_sweeper(config)


def _refusing(check: Callable[[DictConfig], None], config: DictConfig) -> None:
    try:
        check(config)
    except Exception as error:
        raise _Refused(as_config_error(error)) from error


def jobs(config_name: str) -> list[Composed]:
    """What `run` composes, and nothing is run. Raises what `run` does."""
    found: list[Composed] = []

    def keep(job: Composed) -> float:
        found.append(job)
        return 0.0

    run(config_name, keep)
    return found


def run(
    config_name: str,
    job: Callable[[Composed], Any],
    *,
    check_points: Callable[[list[Point]], bool] | None = None,
) -> None:
    """Compose sys.argv on conf/<config_name>.yaml and call `job` once, or with -m once per combination.

    `job` returns the objective that Hydra's sweepers minimise (a launcher may ask for something else), or raises
    FailedTrial: a sweeper that knows no failed trials then gets infinity. What else it raises is raised here, after
    every job of a sweep was tried; what is wrong with the command line is a ConfigError. --help and its kin leave by
    SystemExit(0). submitit's launchers call a copy of `job` in processes of their own.

    check_points: called once with all jobs of a grid before the first is launched; false: launch none.
    """
    _prepare_hydra()
    driver = slurm_job.this_process()
    NoteSweep.started = None
    failures: list[Exception] = []
    typed = arguments.normalised(sys.argv[1:], config_name)  # a launcher may run the task in another process
    sys.argv[1:] = typed
    usual = os.environ.get(FULL_ERROR)

    def task(composed: DictConfig) -> Any:
        try:
            with _full_errors(usual):
                return job(job_of(composed, typed))
        except FailedTrial:
            if counts_failures(HydraConfig.get()):
                raise
            return math.inf
        except Exception as error:  # raised later: here Hydra would print a report of its own
            failures.append(error)
            if slurm_job.this_process() != driver:
                print(error, file=sys.stderr, flush=True)
                slurm_job.end_with(1)
            elif HydraConfig.get().mode == RunMode.RUN and "note_sweep" in HydraConfig.get().callbacks:
                raise
            return math.inf

    def check(points: list[Point]) -> bool:
        try:
            return check_points is None or check_points(points)
        except Exception as error:
            failures.append(error)
            raise

    task.check_points = check  # type: ignore[attr-defined]
    try:
        repeated.check(arguments.overrides_in(typed))
        with _full_errors("1"):  # Hydra then raises instead of printing and leaving with exit code 1
            hydra.main(version_base="1.3", config_path=_conf_directory(), config_name=config_name)(task)()
    except _Refused as refused:
        raise refused.args[0] from None
    except Exception as error:
        if isinstance(error, BridgeError | FailedTrial) or error in failures:
            raise
        raise as_config_error(error, primary=config_name) from error
    if failures:
        raise failures[0]


@contextmanager
def _full_errors(value: str | None) -> Iterator[None]:
    before = os.environ.get(FULL_ERROR)
    _set_environment(FULL_ERROR, value)
    try:
        yield
    finally:
        _set_environment(FULL_ERROR, before)


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def as_config_error(error: Exception, *, primary: str = "train") -> ConfigError:
    """What went wrong while Hydra composed, as one line of the user's; raises `error` itself when it is none of his."""
    if isinstance(error, ConfigError):
        return error
    if not of_the_users(error):
        raise error
    return ConfigError(one_line(error, typed=sys.argv[1:], primary=primary))


def counts_failures(hydra: Any) -> bool:
    """Whether a job may tell Hydra that it failed: its sweeper then goes on, or there is none."""
    return hydra.mode == RunMode.RUN or "max_failure_rate" in hydra.sweeper or hydra.sweeper._target_ == GRID_SWEEPER


def add_option(group: str, name: str, values: Mapping[str, Any]) -> None:
    """Make `group=name` choose `values`, as a file conf/GROUP/NAME.yaml would."""
    ConfigStore.instance().store(group=group, name=name, node=OmegaConf.create(dict(values)))


def absolute(settings: Mapping[str, Any], *, names: frozenset[str]) -> dict[str, Any]:
    """`settings` with its paths made absolute: every text under a key in `names` or ending in _path, _paths or _dir.

    In a mapping under such a key the names of numbers are paths, too: {path: weight}. A URL stays.
    """

    def convert(value: Any, is_path: bool) -> Any:
        if isinstance(value, Mapping):
            return {
                _absolute(str(name)) if is_path and isinstance(item, int | float) else str(name): convert(
                    item, is_path or named_path(str(name))
                )
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [convert(item, is_path) for item in value]
        return _absolute(value) if is_path and isinstance(value, str) and value else value

    def named_path(key: str) -> bool:
        return key in names or key.endswith(("_path", "_paths", "_dir"))

    return {key: convert(value, named_path(key)) for key, value in settings.items()}


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _prepare_hydra() -> None:
    _declare_open_sections()
    group_options.share_repository()
    option_files.check_all()
    model_of_init.take_from_now_on(Path(_conf_directory()))
    compose_once.from_now_on()
    optuna.set_defaults()  # imports Hydra's plugins, which store their options anew
    ConfigStore.instance().store(
        group="hydra/sweeper", name="basic", node=BasicSweeperConf(_target_=GRID_SWEEPER), provider="bridge"
    )


def _declare_open_sections() -> None:
    """Register the entries `open_sections` and `open_model` of the primary files' defaults lists.

    Hydra closes the composed tree; a node with its own struct=False stays open: `model.qk_layernorm=true` needs no '+'.
    """
    sections = {name: DictConfig({}, flags={"struct": False}) for name in OPEN_SECTIONS}
    ConfigStore.instance().store(name="open_sections", node=OmegaConf.create(sections))
    ConfigStore.instance().store(name="open_model", node=OmegaConf.create({"model": sections["model"]}))


def _choice(group: str, *, _root_: DictConfig) -> str:
    """`${choice:model}` in YAML: the chosen option of a group.

    Hydra's own `${hydra:runtime.choices.model}` has no value yet when the directory of a sweep is named.
    """
    settings = _root_.get("hydra") or HydraConfig.get()
    return str(settings.runtime.choices.get(group))  # None after ~model


def _mode_by_launcher(*, _root_: DictConfig) -> str | None:
    """`${mode_by_launcher:}`: Hydra ignores the launcher of a single run, so another than the usual one implies -m.

    Of our own not when nothing varies: such a run keeps its usual directory, and the driver submits it.
    """
    launcher = OmegaConf.select(_root_, "hydra.launcher._target_")
    if launcher is None or launcher.endswith(".BasicLauncher"):
        return None
    sweeper = OmegaConf.select(_root_, "hydra.sweeper")
    if launcher != slurm.TARGET or "--multirun" in sys.argv[1:] or not hydra_keys.is_grid(sweeper):
        return str(RunMode.MULTIRUN.name)
    values = arguments.overrides_in(sys.argv[1:])
    values += [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    swept = any(override.is_sweep_override() for override in OverridesParser.create().parse_overrides(values))
    return str((RunMode.MULTIRUN if swept else RunMode.RUN).name)


# At import: submitit's launchers compose again in their jobs, where only what a pickle needs is imported.
OmegaConf.register_new_resolver("choice", _choice, replace=True)
OmegaConf.register_new_resolver("mode_by_launcher", _mode_by_launcher, replace=True)


def job_of(composed: DictConfig, typed: list[str]) -> Composed:
    """The job of a composed configuration without `hydra`, which HydraConfig holds. typed: the driver's arguments."""
    try:
        return _job(composed, typed)
    except ConfigError:
        raise
    except Exception as error:  # Hydra's own settings are whatever the user made of them
        raise ConfigError(one_line(error, typed=typed)) from error


def _job(composed: DictConfig, typed: list[str]) -> Composed:
    settings = HydraConfig.get()
    for slot in arguments.SLOTS:
        if slot in composed:
            file = f"{slot}/{settings.runtime.choices.get(slot)}.yaml"
            raise ConfigError(f"{slot}: {file} sets keys of '{slot}'; make its first line '# @package _global_'")
    overrides = OmegaConf.to_container(settings.overrides.task, resolve=False)  # as typed: with ${...}
    assert isinstance(overrides, list)
    launcher = _resolve(settings.launcher)
    target = launcher.pop("_target_")
    of_slurm = launcher if target == slurm.TARGET else None
    if settings.mode != RunMode.MULTIRUN:
        return Composed(_resolve(composed), overrides, slurm=of_slurm, launcher=target)
    return Composed(
        settings=_resolve(composed),
        overrides=overrides,
        number=int(settings.job.num),
        swept=swept_among(overrides, typed),
        directory=Path(settings.runtime.output_dir),
        slurm=of_slurm,
        sweep_directory=Path(os.path.abspath(os.path.join(settings.runtime.cwd, str(settings.sweep.dir)))),
        launcher=target,
        suggested=not hydra_keys.is_grid(settings.sweeper),
    )


def swept_among(overrides: Sequence[str], typed: list[str]) -> tuple[str, ...]:
    """Those of a job's overrides that are not typed with one value."""
    fixed = _single_valued(typed)
    return tuple(override for override in overrides if override not in fixed)


def _single_valued(typed: list[str]) -> set[str]:
    """The overrides among `typed` that give one value, as typed and as sweepers write them: lr=1e-3, lr=0.001."""
    overrides = OverridesParser.create().parse_overrides(arguments.overrides_in(typed))
    single = [override for override in overrides if not override.is_sweep_override()]
    written = {f"{override.get_key_element()}={override.get_value_element_as_str()}" for override in single}
    return written | {str(override.input_line) for override in single}


def _resolve(composed: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _conf_directory() -> str:
    """An installed wheel carries conf inside the package; a checkout has it beside the package."""
    package = Path(bridge.__file__).parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")
