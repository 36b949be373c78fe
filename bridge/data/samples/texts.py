"""What the sources of concatenated texts have in common. This file imports no torch."""

from pathlib import Path

from bridge.data.source import Datasets, Prepared, SourceConfig


def check_tokenizer(tokenizer: str | None) -> None:
    """Raises ConfigError when data.tokenizer names no tokenizer."""
    if tokenizer is not None:
        from bridge.data.encode.tokenizer import file_of

        file_of(Path(tokenizer).expanduser())


def build(config: SourceConfig, prepared: Prepared, *, seed: int) -> Datasets:
    """Training and validation samples of the prepared texts."""
    from bridge.data.samples import concatenated

    return concatenated.build(prepared, sequence_length=config.sequence_length, seed=seed)
