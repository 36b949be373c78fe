"""What `convert.py` does, one file per mode."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.config.schema import ConvertConfig


def run(config: "ConvertConfig") -> int:
    """Run `config.mode`; the exit code: 0, or 1 when verify finds a difference. Raises BridgeError on wrong input."""
    from bridge import platform
    from bridge.convert import paths

    paths.check(config)
    platform.prepare()  # before the modes import megatron-core
    from bridge.convert import export, import_, model_yaml, verify

    modes = {"import": import_.run, "export": export.run, "verify": verify.run, "yaml": model_yaml.run}
    return modes[config.mode](config)
