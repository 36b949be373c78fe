"""From the plain values of a configuration to megatron-core's TransformerConfig."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from bridge import platform
from bridge.config import complete, mcore_fields
from bridge.config.annotation import DTYPES
from bridge.config.own_fields import OwnFields
from bridge.config.routing import Routed
from bridge.errors import ConfigError, shown
from bridge.models.modules import rope
from bridge.models.unequal_layers import LayerSizes, layer_fields


@dataclass
class Config(LayerSizes, OwnFields, TransformerConfig):
    """megatron-core's TransformerConfig with the keys of this project, for modules of both to read.

    `rotated_query_scale` is not a key: it follows from rope_parameters and rotary_percent (`attention_factor_fields`).
    """

    # (channels of a head that are rotated, what they are multiplied by in queries); None: nothing is multiplied.
    rotated_query_scale: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        with _bias_on_any_score(self):
            super().__post_init__()


@dataclass
class MLAConfig(OwnFields, MLATransformerConfig):
    """The same for models with multi-latent attention."""

    def __post_init__(self) -> None:
        with _bias_on_any_score(self):
            super().__post_init__()


@contextlib.contextmanager
def _bias_on_any_score(config: TransformerConfig) -> Iterator[None]:
    """megatron-core refuses an expert bias on softmax scores, which its own router lacks and ours has."""
    score = config.moe_router_score_function
    if config.moe_router_enable_expert_bias:
        config.moe_router_score_function = "sigmoid"
    yield
    config.moe_router_score_function = score


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU (transformers' gelu_pytorch_tanh)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
}


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, DTYPES[name])


# Fields whose YAML form is a word or a list for something YAML cannot hold.
TYPED: dict[str, Callable[[Any], Any]] = {
    "activation_func": ACTIVATIONS.__getitem__,
    "params_dtype": _dtype,
    "pipeline_dtype": _dtype,
    "autocast_dtype": _dtype,
    "attention_backend": AttnBackend.__getitem__,
    "window_size": tuple,
}
# For a build on the meta device: nothing to initialise, "CPU" initialisation because only that path lets torch.device
# choose, and the local layers because Transformer Engine's allocate for themselves. Names and shapes are the same.
WITHOUT_STORAGE = {
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "transformer_impl": "local",
    "moe_grouped_gemm": False,
}
# bridge.models.modules.latent_attention replaces megatron-core's own rotary embedding, and the fused kernel with it.
LATENT: dict[str, Any] = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "apply_rope_fusion": False}


def transformer_config(routed: Routed, *, dtype: torch.dtype | None = None, meta: bool = False) -> Config | MLAConfig:
    """megatron-core's config: the user's values over the platform's defaults over megatron-core's.

    `dtype` overrides params_dtype, bf16 and fp16. `meta` prepares for a build without storage. The attention factor of
    rope_parameters becomes part of softmax_scale, or of the queries. Raises ConfigError for a value that this platform
    or megatron-core refuses.
    """
    platform.check(routed.transformer, routed.origin)
    user = typed(routed)
    fields = _defaults(user) | user
    fields |= precision(fields, dtype)
    fields |= attention_factor_fields(routed, fields)
    fields |= layer_fields(fields)
    fields |= WITHOUT_STORAGE if meta else {}
    latent = fields.get("multi_latent_attention", False)
    try:
        if latent:
            return MLAConfig(**(fields | LATENT))
        return Config(**{name: value for name, value in fields.items() if name not in mcore_fields.mla_only()})
    except (ValueError, AssertionError, ImportError) as error:
        raise ConfigError(f"{_keys_in(str(error), routed)}: megatron-core refuses it: {error}") from error


def typed(routed: Routed) -> dict[str, Any]:
    """The fields the user set, each as the type that megatron-core holds. Raises ConfigError for an unknown word."""
    fields = dict(routed.transformer)
    for name, convert in TYPED.items():
        if fields.get(name) is None:
            continue
        try:
            fields[name] = convert(fields[name])
        except KeyError:
            raise ConfigError(f"{routed.key(name)}: {shown(fields[name])} is not a value of this field") from None
    return fields


FOR_EXPERTS = frozenset({"moe_grouped_gemm", "moe_permute_fusion"})


def _defaults(user: Mapping[str, Any]) -> dict[str, Any]:
    """The platform's defaults without those that this model cannot use."""
    ours = ("moe_token_dispatcher_type",)
    defaults = platform.default_fields() | {name: complete.OWN_DEFAULTS[name] for name in ours}
    if user.get("num_moe_experts") is None:
        defaults = {name: value for name, value in defaults.items() if name not in FOR_EXPERTS or not value}
    else:
        if user.get("transformer_impl") == "local":  # its grouped product needs a package of its own, grouped_gemm
            defaults["moe_grouped_gemm"] = False
        elif user.get("add_bias_linear", True) and defaults["moe_grouped_gemm"]:
            defaults["bias_dropout_fusion"] = False  # TEGroupedMLP asserts so with biases
    swiglu = user.get("activation_func") is F.silu and user.get("gated_linear_unit", False)
    # The fused SwiGLU knows neither clamping nor an offset, and megatron-core does not say so.
    more = ("use_te_activation_func", "activation_func_clamp_value", "glu_linear_offset")
    if not swiglu or any(user.get(name) for name in more):
        defaults["bias_activation_fusion"] = False
    return defaults


def precision(fields: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """params_dtype follows bf16 and fp16, pipeline_dtype follows params_dtype, unless set; `dtype` overrides all."""
    if dtype is not None:
        half = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
        return half | {"params_dtype": dtype, "pipeline_dtype": dtype}
    by_flag = torch.bfloat16 if fields.get("bf16") else torch.float16 if fields.get("fp16") else torch.float32
    params = fields.get("params_dtype", by_flag)
    return {"params_dtype": params, "pipeline_dtype": fields.get("pipeline_dtype") or params}


def attention_factor_fields(routed: Routed, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The attention factor of YaRN and LongRoPE, as part of the softmax scale or of the queries.

    Hugging Face multiplies cos and sin of queries and of keys by it, so every logit by its square: the same as a larger
    softmax scale, which reaches every attention kernel, also those with fused or packed rotary embedding where
    apply_rotary_pos_emb drops megatron-core's own factor (`mscale`). Where some channels, or some layers, are not
    rotated their logits keep their size: the rotated channels of the queries take the square, before any kernel.
    """
    parameters = routed.transformer.get("rope_parameters")
    if not parameters or routed.transformer.get("multi_latent_attention"):
        return {}
    key = "model.rope_parameters"
    if routed.gpt.get("position_embedding_type") != "rope":
        raise ConfigError(f"{key}: {parameters['rope_type']} scaling needs model.position_embedding_type=rope")
    factor = rope.attention_factor(parameters, max_sequence_length=routed.gpt["max_sequence_length"])
    if factor == 1.0:
        return {}
    if fields.get("rope_local_base_freq"):
        raise ConfigError(
            f"{key}: an attention factor of {factor:g} would also reach the layers with a window, whose rotary "
            "embedding has no scaling; leave model.rope_local_base_freq out or set another rope_type"
        )
    channels = complete.head_widths(fields).key
    share = routed.get("rotary_percent")
    if share != 1.0 or fields.get("no_rope_freq"):
        if fields.get("fused_single_qkv_rope"):
            raise ConfigError(
                f"{key}: an attention factor of {factor:g} with fused_single_qkv_rope needs model.rotary_percent=1.0 "
                "and no model.no_rope_freq"
            )
        return {"rotated_query_scale": (int(channels * share), factor**2)}
    plain = fields.get("softmax_scale") or 1 / math.sqrt(channels)
    return {"softmax_scale": plain * factor**2}


def _keys_in(message: str, routed: Routed) -> str:
    """Full keys of the fields a megatron-core message names; longest first, so that no name inside a name is taken."""
    found = [name for name in sorted(routed.origin, key=len, reverse=True) if name in message]
    return ", ".join(routed.origin[name] for name in found[:2]) or "model"
