"""Sends every key of the sections model, parallelism, precision and optimizer to the mcore dataclasses that have it.

The values stay plain Python (strings for dtypes, enumerations and activation functions): no torch here.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from bridge.config import annotation, complete, mcore_fields, modules, other_names, own_fields, sections
from bridge.config.divisibility import Number
from bridge.config.mcore_fields import Field
from bridge.errors import ConfigError, did_you_mean, shown

SECTIONS = ("model", "parallelism", "optimizer", "precision")

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu")
OPTIMIZERS = ("adam", "sgd")

# Keys of `model` that megatron-core does not have; those beside the fields of its modules go to the gpt part.
_GPT_KEYS = {"family": "str", "vocab_size": "int", "make_vocab_size_divisible_by": "int"}
_OWN_KEYS = _GPT_KEYS | own_fields.annotations()
_REQUIRED = ("family", "num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length")
_POSITIVE = (*_REQUIRED[1:], "make_vocab_size_divisible_by")

# Types that are narrower here than megatron-core's annotation says, or wider where its code takes more.
_RETYPED = {
    "rotary_base": "float",  # GPTModel says int and only divides by powers of it
    "activation_func": f"Literal{list(ACTIVATIONS)}",
    "optimizer": f"Literal{list(OPTIMIZERS)}",
    "q_lora_rank": "Optional[int]",  # null: queries without a latent
    # fp8 is a format of optimizer states only.
    "params_dtype": "Literal['fp32', 'bf16', 'fp16']",
    "pipeline_dtype": "Literal['fp32', 'bf16', 'fp16', None]",
    "autocast_dtype": "Literal['fp32', 'bf16', 'fp16', None]",
}

# Fields and arguments that no configuration may set, and why.
_ROPE_REASON = "rotary scaling has one key here; set model.rope_parameters"
_BUILD_REASON = "the program sets it while building the model; leave it out"
_REFUSED = {
    "init_method": "a function cannot be written in YAML; set model.init_method_std",
    "output_layer_init_method": "a function cannot be written in YAML; set model.init_method_std",
    "embedding_init_method": "a function cannot be written in YAML; set model.embedding_init_method_std",
    "quant_recipe": "an object cannot be written in YAML; leave it out",
    "rope_scaling": _ROPE_REASON,
    "rope_scaling_factor": _ROPE_REASON,
    "seq_len_interpolation_factor": _ROPE_REASON,
    "pre_process": _BUILD_REASON,
    "post_process": _BUILD_REASON,
    "parallel_output": _BUILD_REASON,
    "vp_stage": _BUILD_REASON,
    "scatter_embedding_sequence_parallel": _BUILD_REASON,
    # MLATransformerConfig's own rotary fields
    "rope_type": _ROPE_REASON,
    "rotary_scaling_factor": _ROPE_REASON,
    "original_max_position_embeddings": _ROPE_REASON,
    "beta_fast": _ROPE_REASON,
    "beta_slow": _ROPE_REASON,
    "mscale": _ROPE_REASON,
    "mscale_all_dim": _ROPE_REASON,
    "cache_mla_latents": "it belongs to megatron-core's dynamic inference, which is not used here; leave it out",
}
_OBJECT_REASON = "it is a function or object that the program sets at run time; leave it out"

# Fields of which only megatron-core's own default works here, and why.
_FIXED = {
    "use_megatron_fsdp": "only megatron-core's DistributedDataParallel is used",
    "use_custom_fsdp": "only megatron-core's DistributedDataParallel is used",
    "init_model_with_meta_device": "the program decides where the model is built",
    "heterogeneous_block_specs": "every layer of a model has the same specification",
    "is_hybrid_model": "only GPT models are built",
    "hybrid_context_parallel": "batches are split evenly over context-parallel ranks",
}

# rope_type -> (keys it needs, keys it may have); transformers' modeling_rope_utils.
_YARN_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),  # transformers does not read original_max_position_embeddings for it
    "yarn": (("factor",), ("original_max_position_embeddings", *_YARN_OPTIONAL)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor", "original_max_position_embeddings")),
}
_ROPE_TYPES = {"truncate": "bool", "short_factor": "list[float]", "long_factor": "list[float]"}


@dataclass(frozen=True)
class Routed:
    """The sections by destination. Plain values, and only those the configuration sets: null where null is mcore's own
    default counts as not set.

    `get`, `key` and `number` read by name, whichever the destination. Nothing changes the dicts of one that is made.
    """

    transformer: dict[str, Any]  # fields of TransformerConfig, of MLATransformerConfig, and own_fields.OwnFields
    ddp: dict[str, Any]  # fields of DistributedDataParallelConfig
    optimizer: dict[str, Any]  # fields of OptimizerConfig
    gpt: dict[str, Any]  # arguments of GPTModel, and our own: vocab_size (unpadded), make_vocab_size_divisible_by
    family: str
    origin: dict[str, str]  # field -> full key, e.g. "hidden_size" -> "model.hidden_size"

    @cached_property
    def given(self) -> dict[str, Any]:
        """Everything the configuration sets."""
        return {**self.optimizer, **self.ddp, **self.gpt, **self.transformer}

    @cached_property
    def _values(self) -> dict[str, Any]:
        return complete.with_derived(_defaults() | self.given)

    def get(self, name: str, default: Any = None) -> Any:
        """The value that is set, or that follows from those that are, or this program's default or megatron-core's;
        where all this is null: `default`."""
        value = self._values.get(name)
        return default if value is None else value

    def key(self, name: str) -> str:
        """The full key of a field: where it is set, else where it would be looked for."""
        return self.origin.get(name) or home(name)

    def number(self, name: str, default: int = 1) -> Number:
        """`get` for a formula."""
        return Number(name, self.get(name, default), self.origin.get(name, ""))


@cache
def _defaults() -> dict[str, Any]:
    return mcore_fields.defaults() | complete.OWN_DEFAULTS


# Fields that stand in another section than that of their class or their neighbours in it, by the start of their names.
_ELSEWHERE = {
    "precision": (
        *("bf16", "fp16", "fp8", "fp4", "params_dtype", "pipeline_dtype", "autocast_dtype", "grad_reduce_in_fp32"),
        *("initial_loss_scale", "min_loss_scale", "loss_scale", "hysteresis"),
    ),
    "parallelism": ("recompute_", "tp_comm_"),
}


def home(name: str) -> str:
    """The full key under which the shipped files and documents have a field; it may stand in another section."""
    return f"{_home_section(name)}.{name}"


def _home_section(name: str) -> str:
    for section, starts in _ELSEWHERE.items():
        if name.startswith(starts):
            return section
    fields = mcore_fields.targets()
    if name in mcore_fields.model_parallel() or name in fields["ddp"]:
        return "parallelism"
    return "optimizer" if name in fields["optimizer"] else "model"


def route(config: Mapping[str, Mapping[str, Any]]) -> Routed:
    """Routes sections model, parallelism, optimizer and precision of `config`.

    Raises ConfigError for an unknown key, a value of the wrong type, a key in two sections, a field that no
    configuration may set, a missing architecture key, an unknown family.
    """
    targets = mcore_fields.targets()
    parts: dict[str, dict[str, Any]] = {part: {} for part in targets}
    origin: dict[str, str] = {}
    for section, name, value in _entries(config):
        key = f"{section}.{name}"
        if name in origin:
            raise ConfigError(f"{key}: is also set as {origin[name]} (here {shown(value)}); keep one of the two")
        origin[name] = key
        if name in _OWN_KEYS and section == _home_section(name):
            annotation.check(key, value, _OWN_KEYS[name])
            if value is not None:
                parts["gpt" if name in _GPT_KEYS else "transformer"][name] = value
            continue
        _check_field(key, name, value, targets)
        for part, fields in targets.items():
            if name in fields and not (value is None and fields[name].default == "None"):
                parts[part][name] = value
    family = _check_model(parts, origin)
    return Routed(**parts, family=family, origin=origin)


def settable(name: str, field: Field) -> bool:
    """Whether a configuration may set this field at all."""
    return name not in _REFUSED and (name in _RETYPED or mcore_fields.expressible(field))


def _entries(config: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    for section in SECTIONS:
        values = config.get(section, {})
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{section}: {shown(values)} is not a section; set its keys one by one, e.g. {section}.KEY=VALUE"
            )
        for name, value in values.items():
            yield section, str(name), value


def own() -> dict[str, str]:
    """Full key -> type, of the keys that megatron-core does not have."""
    return {home(name): text for name, text in _OWN_KEYS.items()}


def _check_field(key: str, name: str, value: Any, targets: Mapping[str, Mapping[str, Field]]) -> None:
    declared = [fields[name] for fields in targets.values() if name in fields]
    if not declared:
        raise _unknown(key, name, value, targets)
    _refuse(key, name, value, declared)
    for field in declared:
        checked = _RETYPED.get(name) or mcore_fields.checked_annotation(field)
        annotation.check(key, value, checked, mcore_fields.enums())


def _refuse(key: str, name: str, value: Any, declared: list[Field]) -> None:
    if name in _REFUSED:
        raise ConfigError(f"{key}: cannot be set (value {shown(value)}): {_REFUSED[name]}")
    if name not in _RETYPED and not all(mcore_fields.expressible(field) for field in declared):
        raise ConfigError(f"{key}: cannot be set (value {shown(value)}): {_OBJECT_REASON}")
    if name in _FIXED and value != ast.literal_eval(declared[0].default or "None"):
        raise ConfigError(f"{key}: {shown(value)} is not supported: {_FIXED[name]}; leave it out")


def _unknown(key: str, name: str, value: Any, targets: Mapping[str, Mapping[str, Field]]) -> ConfigError:
    if name in _OWN_KEYS:
        belongs = _home_section(name)
        return ConfigError(
            f"{key}: unknown key (value {shown(value)}); it belongs to the {belongs} section: set {belongs}.{name}"
        )
    own = [other for other in _OWN_KEYS if key.startswith(f"{_home_section(other)}.")]
    known = [
        *own,
        *(field for fields in targets.values() for field, declared in fields.items() if settable(field, declared)),
    ]
    hint = (
        other_names.instead(key, value)
        or did_you_mean(name, known)
        or "; set a field of megatron-core's TransformerConfig, OptimizerConfig or DistributedDataParallelConfig"
    )
    return ConfigError(f"{key}: unknown key (value {shown(value)}){hint}")


def _check_model(parts: dict[str, dict[str, Any]], origin: Mapping[str, str]) -> str:
    """Checks the model as a whole and takes `family` out of it."""
    for name in _REQUIRED:
        if name not in origin:
            raise ConfigError(f"model.{name}: is missing; choose a model (model=tiny) or set it")
    for name in _POSITIVE:
        value = parts["transformer"].get(name, parts["gpt"].get(name, 1))
        if value < 1:
            raise ConfigError(f"{origin[name]}: {shown(value)} is not positive; set a whole number from 1 up")
    if "rope_parameters" in parts["transformer"]:
        _check_rope(parts["transformer"]["rope_parameters"])
    family = str(parts["gpt"].pop("family"))
    modules.require("model.family", family, "models/families")
    return family


def _check_rope(rope: Mapping[str, Any]) -> None:
    path = "model.rope_parameters"
    rope_type = rope.get("rope_type")
    annotation.check(f"{path}.rope_type", rope_type, f"Literal{list(ROPE_KEYS)}")
    required, optional = ROPE_KEYS[str(rope_type)]
    for name, value in rope.items():
        key = f"{path}.{name}"
        if name in ("rope_theta", "partial_rotary_factor"):
            ours = "model.rotary_base" if name == "rope_theta" else "model.rotary_percent"
            raise ConfigError(f"{key}: belongs to another key (value {shown(value)}); set {ours}")
        if name not in ("rope_type", *required, *optional):
            raise sections.unknown_key(key, value, ["rope_type", *required, *optional])
        if name != "rope_type":
            annotation.check(key, value, _ROPE_TYPES.get(name, "float"))
    for name in required:
        if name not in rope:
            raise ConfigError(f"{path}.{name}: is missing; rope_type {rope_type} needs it")
