"""One run's configuration, checked: what the driver writes as RUN_DIR/config.yaml and the workers read."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from bridge.config import effect, modules, routing, sections
from bridge.config.routing import Routed
from bridge.config.schema import RATES, STEPS, Checkpoint, ConvertConfig, Init, Launch, Log, Rerun, Scheduler, Train
from bridge.errors import ConfigError, shown
from bridge.files import read_yaml

# A name becomes a directory, part of commands and an argument of Slurm. `=` and `,` come from override_dirname.
NAME_CHARACTERS = "letters, digits, '_', '-', '.', '=', ',', '+', '@', ':', '~' and, between parts of up to 255, '/'"

_CONVERT_NEEDS = {
    "import": ("hf", "megatron"),
    "export": ("hf", "megatron"),
    "verify": ("hf", "megatron"),
    "yaml": ("hf",),
}
_WRITES = {"mode", "hf", "megatron", "dtype", "workers", "overwrite"}
# Keys that have an effect in each mode; another one that is set is an error.
_CONVERT_READS = {
    "import": {*_WRITES, "family", "make_vocab_size_divisible_by", "check_finite"},
    "export": {*_WRITES, "model", "reference", "max_shard_size"},
    "verify": {"mode", "hf", "megatron", "model", "reference", "prompts", "tolerance", "report"},
    "yaml": {"mode", "hf", "family"},
}


_ABOUT_SAVES = ("save_interval", "keep_last", "keep_best", "async_save", "save_hf")
# Keys in the config.yaml of runs that an earlier version started, by section; they say nothing any more.
_FORMER = {"train": ("eval_iters",)}


@dataclass(frozen=True)
class RunConfig:
    """Every section of conf/train.yaml. The dicts hold plain values and were checked by `from_dict`."""

    name: str
    model: dict[str, Any]
    parallelism: dict[str, Any]
    optimizer: dict[str, Any]
    precision: dict[str, Any]
    peft: dict[str, Any]
    data: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "next_token"})
    scheduler: Scheduler = field(default_factory=Scheduler)
    train: Train = field(default_factory=Train)
    init: Init = field(default_factory=Init)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    rerun: Rerun = field(default_factory=Rerun)
    launch: Launch = field(default_factory=Launch)
    dry_run: bool = False
    eval_only: bool = False
    eval_output: str | None = None
    plan: bool = False
    plan_memory_gib: float = field(default=80.0, metadata={"min": 1})
    runs_dir: str = "runs"

    @property
    def run_dir(self) -> Path:
        """Everything the run writes: runs_dir/name."""
        return Path(self.runs_dir) / self.name

    @cached_property
    def routed(self) -> Routed:
        """The open sections, by the mcore dataclass each key belongs to."""
        return routing.route({section: getattr(self, section) for section in routing.SECTIONS})


def from_dict(config: Mapping[str, Any]) -> RunConfig:
    """Checks every key and value of a composed, resolved configuration. Raises ConfigError on the first fault."""
    fields = {item.name for item in dataclasses.fields(RunConfig)}
    for key, value in config.items():
        if key not in fields:
            raise sections.unknown_key(str(key), value, sorted(fields))
    _check_named(config, "data", "source", package="data")
    _check_named(config, "peft", "method", package="peft")
    if "objective" in config:  # not in the config.yaml of a run that an earlier version started
        _check_named(config, "objective", "name", package="objectives")
    run = _with_rate(_with_length(sections.build(RunConfig, config, "")))
    _check_name(run.name)
    _check_precision(run.routed)
    _check_rates(run)
    if run.train.steps is not None:
        check_schedule(run)
    _check_vocabulary(run, run.routed)
    effect.check(run.routed)
    _check_rerun(run)
    _check_eval_only(run)
    _check_saves(run)
    _check_best(run)
    if run.init.random and run.init.path is not None:
        raise ConfigError(f"init.random: true, and init.path is {run.init.path}; set one of the two")
    return run


def read(path: Path | str) -> RunConfig:
    """The configuration in a config.yaml written by `write`. Raises ConfigError when it is missing or not legal."""
    if not Path(path).exists():
        raise ConfigError(f"{path}: no such file; give the config.yaml of a run directory")
    loaded = read_yaml(Path(path))
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds no configuration; give the config.yaml of a run directory")
    for section, names in _FORMER.items():
        if isinstance(values := loaded.get(section), dict):
            loaded[section] = {name: value for name, value in values.items() if name not in names}
    return from_dict(loaded)


def read_model(path: Path | str) -> dict[str, Any]:
    """The `model` section in a YAML file: that of a whole configuration, or all of a file like those in conf/model.

    Raises ConfigError when there is none.
    """
    try:
        loaded = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model: {path} cannot be read ({error.strerror}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"model: {path} is not readable as YAML ({' '.join(str(error).split())})") from error
    section = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(section, dict) or not section:
        raise ConfigError(f"model: {path} holds no `model` section; give a file like those in conf/model")
    return section


def write(config: RunConfig, path: Path | str) -> None:
    """Writes `config` as YAML that `read` gives back equal."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")


def convert_from_dict(config: Mapping[str, Any]) -> ConvertConfig:
    """Checks a composed conf/convert.yaml. Raises ConfigError with the full key on the first fault."""
    convert = sections.build(ConvertConfig, config, "")
    for name in _CONVERT_NEEDS[convert.mode]:
        if getattr(convert, name) is None:
            raise ConfigError(f"{name}: is missing; mode={convert.mode} needs it: set {name}=DIR")
    convert = dataclasses.replace(convert, model=convert.model or None)
    for key in dataclasses.fields(ConvertConfig):
        if key.name not in _CONVERT_READS[convert.mode] and getattr(convert, key.name) != key.default:
            raise ConfigError(f"{key.name}: has no effect with mode={convert.mode}; leave it out")
    return convert


def _check_named(config: Mapping[str, Any], section: str, selector: str, *, package: str) -> None:
    values = config.get(section)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section}: {shown(values)} is not a section; set {section}.{selector}")
    modules.check_options(section, selector, values, package=package)


def is_name(name: str) -> bool:
    """Whether `name` can be a run's: a directory or several, of NAME_CHARACTERS."""
    parts = name.split("/")
    return all(re.fullmatch(r"[\w.\-+=,@:~]{1,255}", part) and part not in (".", "..") for part in parts)


def _check_name(name: str) -> None:
    if not is_name(name):
        raise ConfigError(f"name: {name!r} cannot name a directory; use {NAME_CHARACTERS}")


def _check_precision(routed: Routed) -> None:
    fields, origin = routed.transformer, routed.origin
    if fields.get("bf16") and fields.get("fp16"):
        raise ConfigError(f"{origin['fp16']}: is true as well as {origin['bf16']}; set one of the two (precision=...)")
    trained = "bf16" if fields.get("bf16") else "fp16" if fields.get("fp16") else "fp32"
    for name in ("params_dtype", "pipeline_dtype"):
        value = fields.get(name)
        if value not in (None, trained) or (name == "params_dtype" and value is None and trained != "fp32"):
            raise ConfigError(
                f"{routed.key(name)}: {shown(value)} is not the dtype of training, {trained}; set precision={trained}"
            )


def _with_length(run: RunConfig) -> RunConfig:
    """`run` with train.steps set, unless train.epochs is."""
    train = run.train
    if train.steps is not None and train.epochs is not None:
        raise ConfigError(
            f"train.epochs: is {train.epochs}, and train.steps is {train.steps}; set one of the two (train.steps=null)"
        )
    if train.steps is None and train.epochs is None:
        return dataclasses.replace(run, train=dataclasses.replace(train, steps=STEPS))
    return run


def _with_rate(run: RunConfig) -> RunConfig:
    """`run` with optimizer.lr set: unless it is, to that of RATES."""
    rates = RATES.get(run.optimizer.get("optimizer") or "adam")
    if run.optimizer.get("lr") is not None or rates is None:
        return run
    return dataclasses.replace(run, optimizer={**run.optimizer, "lr": rates[run.init.path is not None]})


def check_schedule(run: RunConfig) -> None:
    """Raise ConfigError for a schedule that does not fit into the steps of `run`, which are known."""
    scheduler, steps = run.scheduler, run.train.num_steps
    decay_steps = scheduler.decay_steps(steps)
    if scheduler.warmup_steps(steps) >= decay_steps:
        raise ConfigError(
            f"scheduler.lr_warmup_steps: {scheduler.lr_warmup_steps} is not below the {decay_steps} decay steps "
            f"(scheduler.lr_decay_steps, or train.steps); set {decay_steps - 1} or less"
        )


def _check_rates(run: RunConfig) -> None:
    scheduler, optimizer = run.scheduler, run.routed.optimizer
    if (optimizer.get("min_lr") or 0.0) > optimizer["lr"]:
        raise ConfigError(
            f"optimizer.min_lr: {optimizer['min_lr']} is above optimizer.lr ({optimizer['lr']}); set it to that or less"
        )
    if scheduler.lr_decay_style == "WSD" and scheduler.wsd_decay_steps is None:
        raise ConfigError(
            "scheduler.wsd_decay_steps: is missing; lr_decay_style WSD needs the number of steps of its last phase"
        )


def _check_vocabulary(run: RunConfig, routed: Routed) -> None:
    """A source that says how many token ids it makes must fit the model; a tokenizer given by path, or brought by
    init.path, is counted later."""
    made, room = run.data.get("vocab_size", 0), routed.gpt["vocab_size"]
    tokenizer = run.data.get("tokenizer") or ("tokenizer" in run.data and run.init.path)
    if made > room and not tokenizer:
        raise ConfigError(
            f"data.vocab_size: data.vocab_size <= model.vocab_size must hold, but {made} > {room}; "
            f"set data.vocab_size to {room} or less, or model.vocab_size to {made}"
        )


def _check_saves(run: RunConfig) -> None:
    if run.checkpoint.save:
        return
    asked = {f"checkpoint.{name}": getattr(run.checkpoint, name) for name in _ABOUT_SAVES}
    asked["rerun.mode"] = run.rerun.mode == "validate_results" and run.rerun.mode  # which goes on elsewhere
    for key, value in asked.items():
        if value:
            raise ConfigError(f"{key}: {shown(value)} needs checkpoints, and checkpoint.save is false; set one")
    if run.train.exit_interval is not None:
        raise ConfigError(
            f"train.exit_interval: {run.train.exit_interval} would stop every start there with checkpoint.save=false; "
            f"set train.steps={run.train.exit_interval}"
        )


def _check_best(run: RunConfig) -> None:
    options = run.checkpoint
    if options.best_is == "highest" and options.keep_best in (None, "eval_loss"):
        raise ConfigError(
            "checkpoint.best_is: highest, but the best eval_loss is the lowest; leave it out, or set "
            "checkpoint.keep_best to a metric of which more is better"
        )


def _check_eval_only(run: RunConfig) -> None:
    """What is set for training only may stay: the command line of a run evaluates it when eval_only=true is added."""
    for key in ("plan", "dry_run"):
        if run.eval_only and getattr(run, key):
            raise ConfigError(f"eval_only: true evaluates, and {key}=true is about training; set one of the two")


def _check_rerun(run: RunConfig) -> None:
    if run.rerun.error_injection_rate > 0 and run.rerun.mode != "validate_results":
        raise ConfigError(
            f"rerun.error_injection_rate: {run.rerun.error_injection_rate} has no effect with rerun.mode="
            f"{run.rerun.mode}; set rerun.mode=validate_results or leave it out"
        )
