"""mode=yaml: the conf/model file of a Hugging Face directory, printed."""

from pathlib import Path

import yaml

from bridge.config.schema import ConvertConfig
from bridge.models.hf import config as hf_config


def run(config: ConvertConfig) -> int:
    assert config.hf is not None
    print(model_yaml(config.hf, family=config.family), end="")
    return 0


def model_yaml(hf: str | Path, *, family: str | None = None) -> str:
    """Text of a conf/model YAML file with the architecture of directory `hf`. Raises ConversionError."""
    config = hf_config.read(hf)
    section = hf_config.to_mcore(config, family=family)
    hf_config.tell_unread(config, family=family)
    name = Path(hf).resolve().name
    return f"# The architecture of {name}: save as conf/model/NAME.yaml.\n" + yaml.safe_dump(section, sort_keys=False)
