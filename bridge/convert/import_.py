"""mode=import: a Hugging Face directory becomes a Megatron checkpoint, tensor by tensor."""

from pathlib import Path

import torch

from bridge.config.schema import ConvertConfig
from bridge.models.hf import config as hf_config
from bridge.models.hf import sizes as hf_sizes
from bridge.sources.skeleton import skeleton, torch_dtype
from bridge.weights import locate, pointer
from bridge.weights.hf_assets import copy_assets
from bridge.weights.output import new_directory
from bridge.weights.quantized import open_source
from bridge.weights.transfer import import_tensors, specs_of


def run(config: ConvertConfig) -> int:
    assert config.hf is not None and config.megatron is not None
    summary = import_hf(
        config.hf,
        config.megatron,
        family=config.family,
        dtype=torch_dtype(config.dtype),
        make_vocab_size_divisible_by=config.make_vocab_size_divisible_by,
        check_finite=config.check_finite,
        workers=config.workers,
        overwrite=config.overwrite,
    )
    print(summary)
    print(f"wrote {config.megatron}")
    return 0


def import_hf(
    hf: str | Path,
    megatron: str | Path,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    make_vocab_size_divisible_by: int | None = None,
    check_finite: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> str:
    """Write checkpoint `megatron` (iteration 0) from directory `hf`; the summary line.

    `family` is found by model_type unless given. `dtype` casts the weights; None keeps each tensor's own, and makes
    quantised ones bfloat16. `make_vocab_size_divisible_by`: rows of zeros pad the vocabulary to a multiple of it, for
    programs that want them stored; megatron-core's own load pads by itself. `check_finite` refuses NaN and infinity.
    `workers` threads share the work; None: as many as cores and size make sensible. Raises ConversionError when the
    config is not understood, a tensor is missing, left over or damaged, or the output exists: then nothing was written.
    """
    with new_directory(megatron, overwrite=overwrite, key="megatron") as root:
        config = hf_config.read(hf)
        section = hf_config.to_mcore(config, family=family)
        hf_config.tell_unread(config, family=family)
        if make_vocab_size_divisible_by is not None:
            section["make_vocab_size_divisible_by"] = make_vocab_size_divisible_by
        files = open_source(hf, dtype=dtype)
        hf_sizes.check_stored(section, [spec.shape for spec in specs_of(files).values()], source=hf)
        bones = skeleton(section, hf_names=files.tensors)
        directory = pointer.iteration_directory(root, iteration=0)
        directory.mkdir()
        summary = import_tensors(
            files,
            directory,
            moves=bones.moves,
            table=bones.table,
            dtype=dtype,
            spelling=bones.spelling,
            object_keys=bones.object_keys,
            check_finite=check_finite,
            num_workers=workers,
        )
        locate.write_model_section(root, bones.section)
        (root / locate.HF_ASSETS).mkdir()
        copy_assets(hf, root / locate.HF_ASSETS)
        pointer.write(root, iteration=0)
    return summary
