"""Where a run's weights come from, and the files that its checkpoints carry along for the export."""

import shutil
from pathlib import Path
from typing import Any

from bridge import parallel
from bridge.config.routing import Routed
from bridge.config.run_config import RunConfig
from bridge.sources.load import load_initial
from bridge.weights import locate, pointer
from bridge.weights.hf_assets import CHAT_TEMPLATE, copy_assets, copy_tokenizer


def load(model: list[Any], *, routed: Routed, path: str | None) -> None:
    """Fill `model` (chunks of this rank) from `path`; None leaves the random initialisation; either is printed.

    Raises ConfigError when `path` is missing, is neither kind of model directory, or holds another architecture.
    """
    if path is not None:
        load_initial(model, path, routed)
    if parallel.is_main():
        print(f"weights: {'random initialisation (init.path is not set)' if path is None else path}", flush=True)


def describe(root: Path, config: RunConfig, *, tokenizer: Path | None) -> None:
    """Write ROOT/model.yaml and ROOT/hf before the first checkpoint: what building and exporting the model needs.

    The Hugging Face files come from init.path, except for the tokenizer when the data has one of its own, and for the
    chat template that the data was rendered with.
    """
    if (root / pointer.LATEST).is_file():
        return
    assets = root / locate.HF_ASSETS
    assets.mkdir(parents=True, exist_ok=True)
    brought = None if config.init.path is None else locate.assets(config.init.path, key="init.path")
    if brought is not None and brought.is_dir():  # a checkpoint of Megatron-LM has none
        copy_assets(brought, assets)
    if tokenizer is not None and config.data.get("tokenizer") != str(brought):
        copy_tokenizer(tokenizer, assets)
    elif tokenizer is not None and (tokenizer / CHAT_TEMPLATE).is_file():
        shutil.copyfile(tokenizer / CHAT_TEMPLATE, assets / CHAT_TEMPLATE)
    locate.write_model_section(root, config.model)
