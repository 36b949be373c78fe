"""No adapter: every weight of the model is trained."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""

    method: str = "none"
