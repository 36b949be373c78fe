"""Directories written from a live, sharded model: all ranks take part, and a directory appears whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bridge import checkpoint, parallel
from bridge.api.tasks import ConversionTask, ModelSection, specs_of, stream, tasks
from bridge.convert.export import write_assets
from bridge.errors import BridgeError, ConversionError
from bridge.models.hf import config as hf_config
from bridge.weights import locate, pointer
from bridge.weights.hf_assets import copy_assets
from bridge.weights.hf_files import HfWriter, parse_size
from bridge.weights.output import new_directory
from bridge.weights.progress import Progress


class Assets(NamedTuple):
    """What lies beside the weights: files copied from `directory`; `config`, where there are no files, as it is."""

    directory: Path | None = None
    config: Mapping[str, Any] | None = None

    def write(self, target: Path) -> None:
        if self.config is not None:
            (target / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        if self.directory is not None and self.directory.is_dir():
            copy_assets(self.directory, target)


def save_hf(
    model: Sequence[Any],
    path: str | Path,
    described: ModelSection,
    *,
    assets: Assets,
    overwrite: bool,
    max_shard_size: str,
    show_progress: bool = False,
) -> None:
    """Write a Hugging Face directory: configuration, tokenizer and weights. Rank 0 writes.

    Raises ConversionError on every rank when `path` exists and `overwrite` is false.
    """
    size = parse_size(max_shard_size)
    hf_config.to_hf(described.section, dtype="float32")  # a key it cannot express: on all ranks, before the work
    todo = tasks(model, described)
    with _rank0_directory(new_directory, path, overwrite=overwrite, key="path") as directory:
        _write_weights(model, todo, directory, max_shard_size=size, show_progress=show_progress)
        if directory is not None:
            assets.write(directory)
            write_assets(directory, section=described.section, assets=None, specs=specs_of(todo).values())
    parallel.barrier()


def save_hf_weights(
    model: Sequence[Any],
    path: str | Path,
    described: ModelSection,
    *,
    overwrite: bool,
    max_shard_size: str,
    show_progress: bool = False,
) -> None:
    """Write safetensors files, and their index, into directory `path`, which may hold other files. Rank 0 writes.

    Raises ConversionError on every rank when `path` has weights already and `overwrite` is false.
    """
    size = parse_size(max_shard_size)
    todo = tasks(model, described)
    with _rank0_directory(_beside_others, path, overwrite=overwrite) as directory:
        _write_weights(model, todo, directory, max_shard_size=size, show_progress=show_progress)
    parallel.barrier()


def _write_weights(
    model: Sequence[Any],
    todo: Sequence[ConversionTask],
    directory: Path | None,
    *,
    max_shard_size: int,
    show_progress: bool,
) -> None:
    """Stream `todo` into safetensors files in `directory`, which is None on ranks that only take part."""
    specs = specs_of(todo)
    writer = None if directory is None else HfWriter(directory, specs, max_shard_size=max_shard_size)
    for name, tensor in stream(model, todo, progress=progress_of(todo) if show_progress else None):
        if writer is not None:
            writer.write(name, tensor)
    if writer is not None:
        writer.close()


def progress_of(todo: Sequence[ConversionTask]) -> Progress | None:
    """A progress line for tasks, on rank 0."""
    if not parallel.is_main():
        return None
    num_tensors = sum(len(task.hf_names) for task in todo)
    return Progress("export", num_tensors=num_tensors, num_bytes=sum(task.num_bytes for task in todo))


def save_megatron(
    model: Sequence[Any], path: str | Path, described: ModelSection, *, assets: Assets, overwrite: bool
) -> None:
    """Write a Megatron checkpoint of the weights alone, iteration 0; each rank writes its own shards.

    Raises ConversionError on every rank when `path` exists and `overwrite` is false.
    """
    with _rank0_directory(new_directory, path, overwrite=overwrite, key="path") as root:
        if root is not None:
            pointer.iteration_directory(root, iteration=0).mkdir()
        shared = Path(parallel.all_gather(root and str(root))[0])
        checkpoint.save_weights(pointer.iteration_directory(shared, iteration=0), model)
        if root is not None:
            locate.write_model_section(root, described.section)
            (root / locate.HF_ASSETS).mkdir()
            assets.write(root / locate.HF_ASSETS)
            pointer.write(root, iteration=0)
    parallel.barrier()


@contextmanager
def _rank0_directory(open_directory: Any, path: str | Path, **options: Any) -> Iterator[Path | None]:
    """`open_directory(path, **options)` on rank 0, None on the others; what rank 0 is refused, all ranks raise."""
    with ExitStack() as stack:
        directory, error = None, None
        if parallel.is_main():
            try:
                directory = stack.enter_context(open_directory(path, **options))
            except BridgeError as refused:
                error = refused
        refusals = parallel.all_gather(error and str(error))
        if refusals[0]:
            raise ConversionError(refusals[0])
        yield directory


@contextmanager
def _beside_others(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory inside `path` whose files move up to `path` when the block ends well."""
    path = Path(path).expanduser().absolute()
    old = sorted(path.glob("model*.safetensors*"))
    if old and not overwrite:
        raise ConversionError(f"path: {old[0]} exists; choose another path or set overwrite=True")
    path.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=path))
    try:
        yield partial
        for file in old:
            file.unlink()
        for file in sorted(partial.iterdir()):
            file.rename(path / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
