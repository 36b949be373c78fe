"""data.tokenizer of a run: unless it is set, the one that init.path brings; never a fresh one for a trained model."""

from dataclasses import fields, replace
from pathlib import Path

from bridge.config import modules, run_config
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.runs import run_files
from bridge.runs.claim import latest_step
from bridge.weights import locate


def settled(config: RunConfig) -> RunConfig:
    """`config` with data.tokenizer set where init.path has one, or a run had one before.

    Raises ConfigError when the weights in init.path would be trained on the ids of a vocabulary that is not theirs.
    """
    source = modules.load("data.source", config.data["source"], "data")
    if "tokenizer" not in {field.name for field in fields(source.Config)}:
        return config
    given = config.data.get("tokenizer")
    if given is None and not config.eval_only and latest_step(config.run_dir) is not None:
        return _with(config, _of_run(config.run_dir))  # whatever is in init.path by now
    path = None if config.init.path is None else Path(config.init.path)
    if given is not None or path is None or not (locate.is_hf(path) or locate.is_megatron(path)):
        return config
    assets = locate.assets(path, key="init.path")
    if (assets / "tokenizer.json").is_file():
        return _with(config, str(assets))
    made, known = config.data.get("vocab_size", getattr(source.Config, "vocab_size", None)), config.model["vocab_size"]
    if made is not None and made != known:
        raise ConfigError(
            f"data.tokenizer: is not set, and {assets} has no tokenizer.json; a new vocabulary of {made} tokens "
            f"would not match the {known} of the weights in init.path; set data.tokenizer=DIR to theirs"
        )
    return config


def _with(config: RunConfig, tokenizer: str | None) -> RunConfig:
    return config if tokenizer is None else replace(config, data={**config.data, "tokenizer": tokenizer})


def _of_run(run_dir: Path) -> str | None:
    """data.tokenizer in the configuration of a run that has a checkpoint; without a configuration it is refused."""
    saved = run_dir / run_files.CONFIG
    tokenizer: str | None = run_config.read(saved).data.get("tokenizer") if saved.is_file() else None
    return tokenizer
