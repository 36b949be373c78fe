"""A data source for tests that is made for fine-tuning."""

from bridge.data.mock import Config, build, prepare

__all__ = ["Config", "build", "prepare"]

FINE_TUNES = True
