"""mode=export: a Megatron checkpoint, imported or trained, becomes a Hugging Face directory, tensor by tensor."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.config.schema import ConvertConfig
from bridge.models.hf import config as hf_config
from bridge.sources.described import model_of
from bridge.sources.skeleton import skeleton, torch_dtype
from bridge.weights import locate
from bridge.weights.dist_files import open_dist
from bridge.weights.hf_assets import GENERATION, copy_assets
from bridge.weights.hf_files import main_dtype, parse_size
from bridge.weights.hf_form import read_form
from bridge.weights.key_layouts import canonical
from bridge.weights.ledger import check_megatron
from bridge.weights.output import new_directory
from bridge.weights.spec import TensorSpec
from bridge.weights.transfer import export_specs, export_tensors, specs_of


def run(config: ConvertConfig) -> int:
    assert config.hf is not None and config.megatron is not None
    summary = export_hf(
        config.megatron,
        config.hf,
        dtype=torch_dtype(config.dtype),
        max_shard_size=config.max_shard_size,
        workers=config.workers,
        overwrite=config.overwrite,
        model=config.model,
        reference=config.reference,
    )
    print(summary)
    print(f"wrote {config.hf}")
    return 0


def export_hf(
    megatron: str | Path,
    hf: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    workers: int | None = None,
    overwrite: bool = False,
    model: Mapping[str, Any] | None = None,
    reference: str | Path | None = None,
) -> str:
    """Write Hugging Face directory `hf` from `megatron` (a run, its checkpoints or one iteration); the summary line.

    `workers` threads share the work; None: as many as cores and size make sensible. `model` (a section) or
    `reference` (a Hugging Face directory, whose tokenizer comes along) says which model it is where there is no
    model.yaml, as in checkpoints by megatron-core's own scripts. Raises ConversionError and ConfigError as `import_hf`
    does: then nothing was written.
    """
    size = parse_size(max_shard_size)
    found = locate.locate(megatron)
    with new_directory(hf, overwrite=overwrite, key="hf") as directory:
        described = model_of(found, model=model, reference=reference)
        bones = skeleton(described.section, spelling=read_form(found.directory).spelling)
        dist = canonical(open_dist(found.directory), wanted=[move.mcore_key for move in bones.moves])
        check_megatron(bones.moves, specs_of(dist), source=dist.directory, described_by=described.source)
        summary = export_tensors(
            dist,
            directory,
            moves=bones.moves,
            table=bones.table,
            dtype=dtype,
            max_shard_size=size,
            num_workers=workers,
        )
        specs = export_specs(dist, moves=bones.moves, dtype=dtype)
        write_assets(directory, section=bones.section, assets=described.assets, specs=specs.values())
    return summary


def write_assets(
    directory: Path, *, section: Mapping[str, Any], assets: Path | None, specs: Iterable[TensorSpec]
) -> None:
    """Write config.json for the tensors written, and copy what there is beside weights in `assets`.

    A model trained from random weights has neither config.json nor generation_config.json there: the ids of its special
    tokens are those of its tokenizer, without which transformers' `generate` would never stop.
    """
    if assets is not None and assets.is_dir():
        copy_assets(assets, directory)
    file = directory / "config.json"
    source = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    dtype = str(main_dtype(specs)).removeprefix("torch.")
    content = hf_config.to_hf(section, dtype=dtype, source=source)
    if source is None and (ids := _special_ids(directory)):
        content |= ids
        if not (directory / GENERATION).is_file():
            (directory / GENERATION).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_ids(directory: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id, as far as the tokenizer in a directory has such tokens."""
    settings, tokenizer = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if not settings.is_file() or not tokenizer.is_file():
        return {}
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]  # of a unigram model a list of [token, score]
    ids = dict(vocab) if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    named = json.loads(settings.read_text(encoding="utf-8"))
    tokens = {kind: named.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    plain = {kind: token["content"] if isinstance(token, dict) else token for kind, token in tokens.items()}
    return {f"{kind}_token_id": ids[token] for kind, token in plain.items() if token in ids}
