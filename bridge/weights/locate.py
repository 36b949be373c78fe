"""Which kind of model directory a path is, and where in it the tensors lie. Reads names and small text files only.

    ROOT/latest_checkpointed_iteration.txt   the newest complete iteration, "100"
    ROOT/model.yaml                          the `model` section the weights belong to
    ROOT/hf/                                 config.json, tokenizer and generation config, for the export
    ROOT/iter_0000100/                       megatron-core torch_dist folder
    ROOT/best                                a link to one of those

A run directory keeps its ROOT in `checkpoints/`. Of a checkpoint by other scripts there may be no more than the
torch_dist folder, under any name: then it is its own ROOT. Megatron-LM's "release" instead of a number is iteration 0.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bridge.errors import ConfigError, DamagedError
from bridge.files import read_yaml
from bridge.weights import pointer
from bridge.weights.pointer import BEST, CHECKPOINTS, LATEST, iteration_of

MODEL_YAML = "model.yaml"
HF_ASSETS = "hf"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")  # of any kind; whether they load AutoTokenizer knows
TORCH_DIST = "torch_dist"


class CheckpointPath(NamedTuple):
    """One iteration of a Megatron checkpoint: `directory` is a torch_dist folder, ROOT/iter_* or ROOT itself."""

    root: Path
    iteration: int
    directory: Path


def is_hf(path: str | Path) -> bool:
    """Whether a directory looks like a Hugging Face model: a config.json and not Megatron's tracker file beside it."""
    return (Path(path) / "config.json").is_file() and not (Path(path) / LATEST).is_file()


def has_tokenizer(directory: Path) -> bool:
    """Whether a Hugging Face directory, or ROOT/hf, holds files of a tokenizer."""
    return any(True for pattern in TOKENIZER_FILES for _ in directory.glob(pattern))


def is_megatron(path: str | Path) -> bool:
    """Whether `locate` has something to look at: a run directory, a checkpoint root or an iteration directory."""
    path = Path(path)
    return root_of(path) is not None or iteration_of(path) is not None or _format(path) is not None


def check_model(path: str | Path, *, key: str) -> None:
    """Raise ConfigError naming `key` unless `path` is a Hugging Face directory or something that `locate` finds."""
    path = Path(path).expanduser().absolute()
    if not path.is_dir():
        fault = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"{key}: {path} {fault}; give a Hugging Face directory or a Megatron checkpoint")
    if is_megatron(path):
        locate(path, key=key)
    elif not is_hf(path):
        raise ConfigError(
            f"{key}: {path} is neither a Hugging Face directory (config.json) nor a Megatron checkpoint ({LATEST}); "
            "give one of the two"
        )


def locate(path: str | Path, *, key: str = "megatron") -> CheckpointPath:
    """The newest iteration of a run directory or checkpoint root, or the iteration directory itself, also by ROOT/best.

    `key` names the user's setting in the message. Raises ConfigError when the path is missing, is none of the three, or
    names an iteration that is not complete.
    """
    path = Path(path).expanduser().absolute()
    if path.name == BEST and path.is_symlink():
        path = path.with_name(os.readlink(path))
    if not path.is_dir():
        raise ConfigError(f"{key}: {path} is not a directory; give a run directory or a Megatron checkpoint")
    if iteration_of(path) is not None:
        root = path.parent
    elif _format(path) is not None:
        root = path
    else:
        found = root_of(path)
        if found is None:
            kind = "a Hugging Face directory" if is_hf(path) else "neither a run nor a Megatron checkpoint"
            raise ConfigError(f"{key}: {path} is {kind}; give a directory with checkpoints/, {LATEST} or metadata.json")
        root, path = found, _latest(found, key=key)
    _check_format(path, key=key)
    return CheckpointPath(root, iteration_of(path) or 0, path)


def assets(path: str | Path, *, key: str = "megatron") -> Path:
    """The directory with config and tokenizer files of a model directory of either kind. Raises as `locate`."""
    path = Path(path).expanduser()
    return locate(path, key=key).root / HF_ASSETS if is_megatron(path) else path


def read_model_section(root: str | Path) -> dict[str, Any]:
    """The `model` section in ROOT/model.yaml. Raises ConfigError when the file is missing or not a mapping."""
    file = Path(root) / MODEL_YAML
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing; write the checkpoint's `model` section (see the run's config.yaml) there"
        )
    section = read_yaml(file)
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: holds no mapping; it must be the checkpoint's `model` section")
    return section


def write_model_section(root: str | Path, section: dict[str, Any]) -> None:
    """Write ROOT/model.yaml; plain values only, in the order of the section."""
    (Path(root) / MODEL_YAML).write_text(yaml.safe_dump(section, sort_keys=False, allow_unicode=True), encoding="utf-8")


def root_of(path: Path) -> Path | None:
    """`path`, or the directory of a run's checkpoints in it, whichever has a pointer to an iteration."""
    return next((root for root in (path, path / CHECKPOINTS) if (root / LATEST).is_file()), None)


def _latest(root: Path, *, key: str) -> Path:
    try:
        latest = pointer.read(root)
    except DamagedError as error:
        raise ConfigError(f"{key}: {error}") from error
    assert latest is not None  # `_root` has found the file
    return latest


def _format(path: Path) -> str | None:
    """The value of Megatron-LM's --ckpt-format that wrote a directory, or None when nothing tells."""
    if any(path.glob("mp_rank_*/*.pt")):
        return "torch"
    if not (path / "metadata.json").is_file():
        return "torch_dcp or fsdp_dtensor" if (path / ".metadata").is_file() else None
    try:
        content = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content.get("sharded_backend") if isinstance(content, dict) else None


def _check_format(path: Path, *, key: str) -> None:
    kind = _format(path)
    if kind == TORCH_DIST and (path / ".metadata").is_file():
        return
    if kind in (None, TORCH_DIST):
        raise ConfigError(
            f"{key}: {path} is not a complete torch_dist checkpoint (.metadata or metadata.json is missing or damaged)"
        )
    if kind in ("torch", "zarr"):
        raise ConfigError(
            f"{key}: {path} is in Megatron-LM's old format '{kind}'; load it with Megatron-LM's training script and "
            "--ckpt-convert-format torch_dist --ckpt-convert-save DIR, then give DIR"
        )
    raise ConfigError(
        f"{key}: {path} has .metadata but no metadata.json: its save was interrupted, or its format is {kind}; "
        "save it with --ckpt-format torch_dist"
    )
