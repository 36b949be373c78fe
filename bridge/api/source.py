"""Where a bridge's files are, and the arguments of such bridges elsewhere that this one does not have."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.errors import ConfigError
from bridge.weights.hf_assets import WEIGHT_SUFFIXES

REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")

# Arguments known elsewhere -> values that ask for nothing, and what to do instead.
NOT_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((False, None), "no code of a model directory is ever run; leave it out"),
    "device_map": ((None,), "the model is built on the device of its process; leave it out"),
    "quantization_config": ((None,), "weights are not quantised; leave it out"),
    "load_in_8bit": ((False, None), "weights are not quantised; leave it out"),
    "load_in_4bit": ((False, None), "weights are not quantised; leave it out"),
    "push_to_hub": ((False, None), "nothing is sent anywhere; upload the directory yourself"),
    "merge_adapter_weights": ((True, None), "models have no adapters here; leave it out"),
    "weight_dtype": ((None,), "tensors keep the model's dtype; cast them as they arrive"),
    "allowed_mismatched_params": ((None, [], ()), "every tensor must fit; leave it out"),
    "strict": ((True, None), "every tensor is accounted for; leave it out"),
    "distributed_save": ((False, None), "rank 0 writes; leave it out"),
    "save_every_n_ranks": ((1, None), "rank 0 writes; leave it out"),
    "low_memory_save": ((False, None), "saving never copies the model; leave it out"),
    "hf_tokenizer_path": ((None,), "the tokenizer files of this bridge's directory are saved; leave it out"),
    "hf_tokenizer_kwargs": ((None, {}), "tokenizer files are copied, not loaded; leave it out"),
    "skip_temp_dist_context": ((None, False), "temporary process groups are not made; leave it out"),
    "use_megatron_fsdp": ((False, None), "only megatron-core's DistributedDataParallel is used; leave it out"),
    "use_torch_fsdp2": ((False, None), "only megatron-core's DistributedDataParallel is used; leave it out"),
    "overlap_param_gather_with_optimizer_step": ((False, None), "it is not supported; leave it out"),
    "data_parallel_random_init": ((False, None), "data-parallel ranks draw the same weights; leave it out"),
    "init_model_with_meta_device": ((False, None), "the model is built with storage; leave it out"),
    "use_cpu_initialization": ((False, None), "set the provider's attribute of that name"),
    "model_type": ((None,), "only decoders are built; leave it out"),
    "pg_collection": ((None,), "megatron-core's global process groups are used; leave it out"),
}


def refuse(method: str, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that asks for what is not supported, TypeError for one nobody knows."""
    for name, value in arguments.items():
        if name not in NOT_SUPPORTED:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        harmless, instead = NOT_SUPPORTED[name]
        if value not in harmless:
            raise ConfigError(f"{name}: {value!r} is not supported by {method}: {instead}")


def directory(path: str | Path, *, key: str, weights: bool) -> Path:
    """The directory of a model: `path` itself, or the local copy of a repository id such as Qwen/Qwen3-4B.

    A repository is fetched through huggingface_hub (its cache, HF_TOKEN and HF_HUB_OFFLINE count): configuration and
    tokenizer, and `weights` when asked. Raises ConfigError naming `key` when it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if not REPOSITORY.fullmatch(str(path)):
        raise ConfigError(f"{key}: {path} does not exist; give a Hugging Face directory or a repository id")
    from huggingface_hub import snapshot_download

    others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if not (weights and suffix == ".safetensors")]
    try:
        return Path(snapshot_download(str(path), ignore_patterns=[*others, "consolidated*", "original/*"]))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these kinds
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}: {path} is not a directory, and cannot be fetched as a repository ({reason}); give a directory"
        ) from error
