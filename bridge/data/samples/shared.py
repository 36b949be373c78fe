"""How samples of a store come into rows: the keys that sources of conversations share. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from bridge.data.source import SourceConfig
from bridge.errors import ConfigError


@dataclass(frozen=True)
class SamplesConfig(SourceConfig):
    """The keys of a source whose samples lie in a `store.Store`."""

    packing: bool = False
    padding_free: bool = False

    def __post_init__(self) -> None:
        if self.packing and self.padding_free:
            raise ConfigError(
                "data.padding_free: true with data.packing=true asks for two ways to do without padding; leave one out"
            )


def dataset(config: SamplesConfig, store: Any, ids: Any, *, seed: int) -> Any:
    """The samples numbered `ids`, int64 [n], in `store`: in rows of their own, packed, or one behind the other."""
    from bridge.data.samples.packed import Packed
    from bridge.data.samples.rows import Rows, Unpadded

    if config.packing:
        return Packed(store, ids, sequence_length=config.sequence_length, seed=seed)
    in_rows = Unpadded if config.padding_free else Rows
    return in_rows(store, ids, sequence_length=config.sequence_length)
