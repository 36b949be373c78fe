"""Config values that depend on the platform: sensible ones where the user is silent, an error where one cannot be."""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from bridge.config.complete import head_widths
from bridge.errors import ConfigError, shown
from bridge.platform.devices import compute_capability, has_transformer_engine, on_cuda

# Fused kernels are CUDA only; on CPU their torch.compile forms are switched off as well, so False says what happens.
WITHOUT_TRANSFORMER_ENGINE = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
}

# gradient_accumulation_fusion needs Apex's fused_weight_gradient_mlp_cuda in megatron-core's own output layer
# (ColumnParallelLinear raises `if not _grad_accum_fusion_available`), so it is on only where that module is installed.
WITH_TRANSFORMER_ENGINE = {
    "transformer_impl": "transformer_engine",
    "apply_rope_fusion": True,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "te",
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
}


def default_fields() -> dict[str, Any]:
    """TransformerConfig field -> value for this platform, to be used only where the user set nothing."""
    if not has_transformer_engine():
        return dict(WITHOUT_TRANSFORMER_ENGINE)
    return WITH_TRANSFORMER_ENGINE | {"gradient_accumulation_fusion": has_apex_weight_gradient()}


def has_apex_weight_gradient() -> bool:
    """True when Apex's CUDA extension for weight gradients is importable."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


class Limit(NamedTuple):
    """One field value that needs something this machine may lack."""

    field: str
    refused: Callable[[Any], bool]
    needs: str
    instead: str


def is_set(value: Any) -> bool:
    return bool(value)


BLACKWELL = (10, 0)  # compute capability
NEEDS_CUDA = (
    Limit("moe_permute_fusion", is_set, "CUDA", "false"),
    Limit("cuda_graph_impl", lambda value: value != "none", "CUDA", "none"),
    Limit("cpu_offloading", is_set, "CUDA", "false"),
    Limit("cross_entropy_loss_fusion", is_set, "CUDA", "false"),
    Limit("enable_autocast", is_set, "CUDA", "false"),
    Limit("moe_token_dispatcher_type", lambda value: value == "flex", "CUDA and DeepEP", "alltoall"),
    Limit("pipeline_model_parallel_comm_backend", is_set, "CUDA", "null"),
    Limit("nccl_ub", is_set, "CUDA", "false"),
    Limit("optimizer_cpu_offload", is_set, "CUDA", "false"),
)
# What only Transformer Engine's layers read: under transformer_impl local, megatron-core would ignore it silently.
ITS_LAYERS = "Transformer Engine's layers (transformer_impl)"
NEEDS_TRANSFORMER_ENGINE = (
    Limit("transformer_impl", lambda value: value != "local", "Transformer Engine", "local"),
    Limit("fp8", is_set, ITS_LAYERS, "null"),
    Limit("fp8_param", is_set, ITS_LAYERS, "false"),
    Limit("fp4", is_set, ITS_LAYERS, "null"),
    Limit("fp4_param", is_set, ITS_LAYERS, "false"),
    Limit("apply_rope_fusion", is_set, "Transformer Engine", "false"),
    Limit("fused_single_qkv_rope", is_set, "Transformer Engine", "false"),
    Limit("cross_entropy_fusion_impl", lambda value: value == "te", "Transformer Engine", "native"),
    Limit("tp_comm_overlap", is_set, ITS_LAYERS, "false"),
    Limit("use_te_rng_tracker", is_set, "Transformer Engine", "false"),
    Limit("use_te_activation_func", is_set, ITS_LAYERS, "false"),
    Limit("moe_grouped_gemm", is_set, ITS_LAYERS, "false"),
    Limit("fine_grained_activation_offloading", is_set, "Transformer Engine", "false"),
    Limit("moe_router_fusion", is_set, "Transformer Engine", "false"),
    Limit("attention_backend", lambda value: value not in ("auto", "local"), ITS_LAYERS, "auto"),
    Limit("apply_query_key_layer_scaling", is_set, ITS_LAYERS, "false"),
    Limit("batch_invariant_mode", is_set, ITS_LAYERS, "false"),
    Limit("disable_parameter_transpose_cache", is_set, ITS_LAYERS, "false"),
    Limit("activation_func_fp8_input_store", is_set, ITS_LAYERS, "false"),
    Limit("moe_latent_size", is_set, ITS_LAYERS, "null"),
    Limit("hierarchical_context_parallel_sizes", is_set, ITS_LAYERS, "null"),
    Limit("delay_wgrad_compute", is_set, ITS_LAYERS, "false"),
    Limit("use_fused_weighted_squared_relu", is_set, ITS_LAYERS, "false"),
    Limit("use_precision_aware_optimizer", is_set, "Transformer Engine", "false"),
    Limit("gradient_accumulation_fusion", is_set, "Transformer Engine and Apex", "false"),
    # Attention without Transformer Engine gathers keys and values, whatever is asked for.
    Limit("cp_comm_type", lambda value: value not in (None, "all_gather"), ITS_LAYERS, "all_gather"),
)


def set_before_blackwell(value: Any) -> bool:
    return bool(value) and compute_capability() < BLACKWELL


NEEDS_BLACKWELL = (
    Limit("fp4", set_before_blackwell, "a Blackwell GPU", "null"),
    Limit("fp8_recipe", lambda value: value == "mxfp8" and compute_capability() < BLACKWELL, "a Blackwell GPU", "null"),
)
NEEDS_PACKAGES = (
    Limit("hierarchical_context_parallel_sizes", lambda value: value and not find_spec("einops"), "einops", "null"),
    Limit(
        "gradient_accumulation_fusion", lambda value: value and not has_apex_weight_gradient(), "Apex's kernel", "false"
    ),
)


def check(transformer: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Raise ConfigError for the first value the user set that this platform would ignore or crash on.

    `transformer` holds plain values by field name, of any of megatron-core's configuration classes, `origin` each
    field's full key (both as in `Routed`).
    """
    for limit in _broken(transformer):
        key, value = origin.get(limit.field, limit.field), transformer[limit.field]
        raise ConfigError(
            f"{key}: {shown(value)} needs {limit.needs}, which this run does not have; set {limit.instead}"
        )


def honoured(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """`transformer` without the values that `check` refuses: enough for questions about shapes, such as a dry run's."""
    refused = {limit.field for limit in _broken(transformer)}
    return {name: value for name, value in transformer.items() if name not in refused}


def _broken(transformer: Mapping[str, Any]) -> Iterator[Limit]:
    limits: tuple[Limit, ...] = () if has_transformer_engine() else NEEDS_TRANSFORMER_ENGINE
    if has_transformer_engine() and transformer.get("transformer_impl") == "local":
        limits += tuple(limit for limit in NEEDS_TRANSFORMER_ENGINE if limit.needs == ITS_LAYERS)
    limits += () if on_cuda() else NEEDS_CUDA
    limits += NEEDS_BLACKWELL + NEEDS_PACKAGES
    limits += _attention_in_fp8(transformer)
    return (limit for limit in limits if limit.field in transformer and limit.refused(transformer[limit.field]))


def _attention_in_fp8(transformer: Mapping[str, Any]) -> tuple[Limit, ...]:
    """What Transformer Engine has no kernel for before Blackwell (dot_product_attention/utils.py, fused_attn.cpp)."""
    limits: tuple[Limit, ...] = ()
    if transformer.get("fp8_recipe") == "tensorwise":
        needs = "a Blackwell GPU with fp8_recipe=tensorwise"
        limits += (Limit("fp8_dot_product_attention", set_before_blackwell, needs, "false, or fp8_recipe=delayed"),)
    sized = transformer.get("hidden_size") and transformer.get("num_attention_heads")
    if not sized or head_widths(transformer).key != 128:
        needs = "128 channels per head or a Blackwell GPU"
        limits += (Limit("fp8_dot_product_attention", set_before_blackwell, needs, "false"),)
    return limits
