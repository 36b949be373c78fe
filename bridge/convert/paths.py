"""The paths of a conversion, looked at before anything slow is imported. No torch."""

from pathlib import Path

from bridge.config.schema import ConvertConfig
from bridge.errors import ConfigError
from bridge.weights import locate
from bridge.weights.output import check_free


def check(config: ConvertConfig) -> None:
    """Raise ConfigError or ConversionError for an input that is missing or of the wrong kind, an output that is in the
    way, and an output that is or holds its own input."""
    inputs = {"import": ("hf",), "export": ("megatron",), "verify": ("hf", "megatron"), "yaml": ("hf",)}[config.mode]
    for key in inputs:
        path = Path(getattr(config, key)).expanduser()
        if key == "hf":
            _check_hf(path, key=key)
        else:
            locate.locate(path, key=key)
    if config.reference is not None:
        _check_hf(Path(config.reference).expanduser(), key="reference")
    output = {"import": "megatron", "export": "hf"}.get(config.mode)
    if output is not None:
        target, source = (Path(getattr(config, key)).expanduser().resolve() for key in (output, inputs[0]))
        if source.is_relative_to(target):
            raise ConfigError(f"{output}: {target} is or contains the input {inputs[0]}; choose another path")
        check_free(target, overwrite=config.overwrite, key=output)


def _check_hf(path: Path, *, key: str) -> None:
    if locate.is_hf(path):
        return
    kind = "does not exist"
    if path.is_dir():
        kind = "is a run or a Megatron checkpoint" if locate.is_megatron(path) else "has no config.json"
    elif path.exists():
        kind = "is a file"
    raise ConfigError(f"{key}: {path} {kind}; give a Hugging Face directory")
