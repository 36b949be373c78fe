"""Keys that would do nothing, or ask for what is not built here: a rule each, on plain values.

megatron-core takes nearly any combination of its fields and reads few of them at a time. A key that is set to more than
its default must act; else it is an error that names what it waits for.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from bridge.config import mcore_fields, own_fields
from bridge.config.routing import Routed
from bridge.errors import ConfigError, shown


class Group(NamedTuple):
    """Keys that act only while key `owner` has one of `values`; empty: any but null, false and 0."""

    names: str  # separated by spaces; `moe_*`: all that begin so
    owner: str
    values: tuple[Any, ...] = ()


# The first one that is broken is reported: an owner before the keys that need it and one of its keys.
GROUPS = (
    # experts
    Group("moe_* norm_topk_prob", "num_moe_experts"),
    Group("moe_shared_expert_gate moe_shared_expert_overlap", "moe_shared_expert_intermediate_size"),
    Group("moe_router_bias_update_rate", "moe_router_enable_expert_bias"),
    Group("moe_pad_expert_input_to_capacity moe_token_drop_policy", "moe_expert_capacity_factor"),
    Group("moe_router_num_groups moe_router_group_score_topk", "moe_router_group_topk"),
    Group("moe_router_pre_softmax", "moe_router_score_function", ("softmax",)),
    Group("moe_flex_dispatcher_backend", "moe_token_dispatcher_type", ("flex",)),
    Group("moe_deepep_num_sms", "moe_flex_dispatcher_backend", ("deepep",)),
    Group("moe_hybridep_num_sms", "moe_flex_dispatcher_backend", ("hybridep",)),
    Group("use_fused_weighted_squared_relu", "num_moe_experts"),
    Group("use_fused_weighted_squared_relu", "activation_func", ("squared_relu",)),
    # attention and MLP
    Group("window_attn_skip_freq rope_local_base_freq", "window_size"),
    Group("rotary_base rotary_percent rotary_interleaved no_rope_freq", "position_embedding_type", ("rope",)),
    Group("rope_local_base_freq apply_rope_fusion fused_single_qkv_rope", "position_embedding_type", ("rope",)),
    Group("activation_func_clamp_value glu_linear_offset", "gated_linear_unit"),
    Group("latent_layernorm_epsilon", "multi_latent_attention"),
    Group("mtp_loss_scaling_factor", "mtp_num_layers"),
    # offloading and graphs (recomputation: layout/recompute.py)
    Group("cpu_offloading_num_layers cpu_offloading_double_buffering", "cpu_offloading"),
    Group("cpu_offloading", "cpu_offloading_num_layers"),
    Group("offload_modules min_offloaded_tensor_size", "fine_grained_activation_offloading"),
    Group("cuda_graph_scope cuda_graph_warmup_steps cuda_graph_retain_backward_graph", "cuda_graph_impl", ("local",)),
    Group("cuda_graph_impl", "use_te_rng_tracker"),
    # precision
    Group("fp8_param fp8_margin fp8_amax_history_len fp8_amax_compute_algo", "fp8"),
    Group("fp8_recipe fp8_quantizer_factory fp8_dot_product_attention", "fp8"),
    Group("fp8_quantizer_factory", "fp8_recipe", ("custom",)),
    Group("fp8_margin fp8_amax_history_len fp8_amax_compute_algo", "fp8_recipe", ("delayed",)),
    Group("fp8_dot_product_attention", "fp8_recipe", ("delayed", "tensorwise")),
    Group("num_layers_at_start_in_bf16 num_layers_at_end_in_bf16", "first_last_layers_bf16"),
    Group("fp4_*", "fp4"),
    Group("autocast_dtype", "enable_autocast"),
    Group("fp32_residual_connection", "enable_autocast"),  # else 16-bit weights meet float32, and mcore stops
    Group("disable_bf16_reduced_precision_matmul", "bf16"),
    Group("initial_loss_scale min_loss_scale loss_scale_window hysteresis", "fp16"),
    # optimizer
    Group("adam_beta1 adam_beta2 adam_eps decoupled_weight_decay", "optimizer", ("adam",)),
    Group("sgd_momentum", "optimizer", ("sgd",)),
    Group("decoupled_min_lr", "decoupled_lr"),
    Group("use_precision_aware_optimizer", "use_distributed_optimizer"),
    Group("store_param_remainders main_params_dtype exp_avg_dtype exp_avg_sq_dtype", "use_precision_aware_optimizer"),
    Group("optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d", "optimizer_cpu_offload"),
    Group("pin_cpu_grads pin_cpu_params", "optimizer_cpu_offload"),
    Group("optimizer_cpu_offload", "optimizer_offload_fraction"),
    Group("disable_symmetric_registration", "nccl_ub"),
)
# Keys that act with any one of several others.
EITHER = (
    ("first_last_layers_bf16 tp_only_amax_red moe_router_padding_for_quantization", ("fp8", "fp4")),
    ("loss_scale", ("fp16", "bf16", "use_distributed_optimizer")),
    ("apply_wd_to_qk_layernorm", ("qk_layernorm", "qk_layernorm_full_width")),
)

# Fields that nothing reads in what is built here, and why. Their defaults stay legal.
_NOWHERE = "megatron-core 0.16.1 reads it nowhere"
_FSDP = "only Megatron-FSDP reads it, and megatron-core's DistributedDataParallel is used"
_INFERENCE = "only megatron-core's inference engines read it, and they are not used"
_MAMBA = "only GPT models are built"
_VARIANT = "attention of another kind than softmax is not built"
_TIMERS = "it belongs to megatron-core's timers, which are not used"
_MUON = "optimizer is adam or sgd"
_LOOP = "megatron-core leaves it to the training loop, and this one does not implement it"
UNREAD: tuple[tuple[str, str], ...] = (
    (_NOWHERE, "moe_extended_tp async_tensor_model_parallel_allreduce moe_token_dropping moe_per_layer_logging"),
    (_NOWHERE, "cuda_graph_use_single_mempool main_grads_dtype apply_residual_connection_post_layernorm"),
    (_FSDP, "data_parallel_sharding_strategy gradient_reduce_div_fusion suggested_communication_unit_size"),
    (_FSDP, "preserve_fp32_weights keep_fp8_transpose_cache fsdp_double_buffer"),
    (_FSDP, "outer_dp_sharding_strategy fsdp_manual_registration"),
    (_INFERENCE, "inference_rng_tracker inference_sampling_seed use_inference_optimized_layers flash_decode"),
    (_INFERENCE, "inference_fuse_tp_communication symmetric_ar_type mlp_chunks_for_prefill"),
    (_MAMBA, "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path"),
    (_VARIANT, "experimental_attention_variant linear_attention_freq linear_conv_kernel_dim linear_key_head_dim"),
    (_VARIANT, "linear_value_head_dim linear_num_key_heads linear_num_value_heads dsa_indexer_n_heads"),
    (_VARIANT, "dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss"),
    (_TIMERS, "barrier_with_L1_time"),
    (_MUON, "muon_momentum muon_split_qkv muon_use_nesterov muon_scale_mode muon_fp32_matmul_prec"),
    (_MUON, "muon_num_ns_steps muon_tp_mode muon_extra_scale_factor"),
    (_LOOP, "qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit log_num_zeros_in_grad"),
    (_LOOP, "moe_enable_routing_replay num_microbatches_with_partial_activation_checkpoints"),
    (
        "only megatron-core's own attention reads it, and another one is used",
        "attention_softmax_in_fp32 masked_softmax_fusion",
    ),
    ("only Apex's norms read it, and they are not used", "memory_efficient_layer_norm persist_layer_norm"),
    ("the loss is computed in float32 here", "fp16_lm_cross_entropy"),
    ("checkpoints are always written that way", "hetereogenous_dist_checkpoint"),
    ("it follows from pipeline_model_parallel_layout", "mtp_standalone"),
    ("Transformer Engine offloads activations and nothing else", "cpu_offloading_activations cpu_offloading_weights"),
    ("Transformer Engine no longer reads it", "fp8_interval fp8_wgrad"),
    ("only Transformer Engine's own attention block reads it, and megatron-core's is used", "fp8_multi_head_attention"),
    ("megatron-core 0.16.1 overwrites what it selects", "use_torch_optimizer_for_cpu_offload"),
    ("batches are split evenly over context-parallel ranks", "max_seqlen_per_dp_cp_rank"),
    ("positions of several dimensions are for models that read images", "mrope_section"),
    ("torch.distributed has no such exchange", "use_ring_exchange_p2p"),
    ("it needs the package kitchen", "use_kitchen use_kitchen_attention kitchen_attention_backend"),
    ("it needs the package grouped_gemm", "moe_use_legacy_grouped_gemm"),
    ("MXFP8 parameters are not built", "fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag"),
)
# Names that megatron-core turns into other ones: what to write instead.
OLD_NAMES = {
    "enable_cuda_graph": "cuda_graph_impl=local",
    "external_cuda_graph": "cuda_graph_impl=local",
    "moe_enable_deepep": "moe_flex_dispatcher_backend=deepep",
    "moe_layer_recompute": "recompute_granularity=selective and recompute_modules=[moe]",
    "moe_router_padding_for_fp8": "moe_router_padding_for_quantization=true",
    "moe_router_topk_limited_devices": "moe_router_group_topk and moe_router_num_groups",
    "tp_comm_split_ag": "tp_comm_overlap_ag",
    "tp_comm_atomic_ag": "tp_comm_overlap_ag",
    "tp_comm_split_rs": "tp_comm_overlap_rs",
    "tp_comm_atomic_rs": "tp_comm_overlap_rs",
}
# The values of these that are built here.
ONLY: dict[str, tuple[Any, ...]] = {
    "cuda_graph_impl": ("none", "local"),  # Transformer Engine's graphs are captured by a helper in the training loop
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "transformer_impl": ("local", "transformer_engine"),
}
# What megatron-core's latent attention would ignore, and the values that ask for nothing.
NOT_IN_LATENT_ATTENTION: dict[str, tuple[Any, ...]] = {
    "add_attention_bias": (None,),
    "add_qkv_bias": (False,),
    "apply_rope_fusion": (False,),
    "attention_output_gate": (False,),
    "fused_single_qkv_rope": (False,),
    "kv_channels": (None,),
    "norm_placement": ("pre",),
    "num_query_groups": (None,),
    "position_embedding_type": ("rope",),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "softmax_scale": (None,),
}


def check(routed: Routed) -> None:
    """Raise ConfigError for a key the user set that would have no effect, or asks for a part that is not built here."""
    for rule in RULES:
        rule(routed)


@cache
def _defaults() -> dict[str, Any]:
    return mcore_fields.defaults() | own_fields.defaults()


def _for_more(routed: Routed, names: str) -> Iterator[str]:
    """Of `names`, as a Group has them, the keys set to more than megatron-core's default."""
    given, defaults = routed.given, _defaults()
    for name in names.split():
        matching = [key for key in given if key.startswith(name[:-1])] if name.endswith("*") else [name]
        yield from (key for key in matching if key in given and given[key] != defaults.get(key))


def _error(routed: Routed, name: str, what: str) -> ConfigError:
    return ConfigError(f"{routed.key(name)}: {shown(routed.given[name])} {what}")


def _unread(routed: Routed) -> None:
    for reason, names in UNREAD:
        for name in _for_more(routed, names):
            raise _error(routed, name, f"has no effect: {reason}; leave it out")
    for name, instead in OLD_NAMES.items():
        for old in _for_more(routed, name):
            raise _error(routed, old, f"is an old name that would change other keys; set {instead}")
    for name, legal in ONLY.items():
        if name in routed.given and routed.given[name] not in legal:
            raise _error(routed, name, f"is not supported; set {' or '.join(legal)}")


def _latent_attention(routed: Routed) -> None:
    if not routed.get("multi_latent_attention"):
        for name in (mcore_fields.mla_only() - routed.gpt.keys()) & routed.given.keys():
            raise _error(
                routed,
                name,
                "has no effect without latent attention; set model.multi_latent_attention=true or leave it out",
            )
        return
    for name, harmless in NOT_IN_LATENT_ATTENTION.items():
        if name in routed.given and routed.given[name] not in harmless:
            raise _error(routed, name, f"is not supported with model.multi_latent_attention; set {harmless[0]}")


def _groups(routed: Routed) -> None:
    for group in GROUPS:
        found = routed.get(group.owner)
        if found in group.values if group.values else found:
            continue
        for name in _for_more(routed, group.names):
            needed = routed.key(group.owner)
            wanted = f"={group.values[0]}" if len(group.values) == 1 else ""
            what = f"has no effect while {group.owner} is {shown(found)}; set {needed}{wanted} or leave it out"
            raise _error(routed, name, what)
    for names, owners in EITHER:
        for key in _for_more(routed, names) if not any(map(routed.get, owners)) else ():
            raise _error(routed, key, f"has no effect without {' or '.join(owners)}; leave it out")


def _graphs(routed: Routed) -> None:
    if "full_iteration" in (routed.get("cuda_graph_scope") or ""):
        raise _error(routed, "cuda_graph_scope", "needs a wrapper around the whole step; set attn, mlp or full")
    for name in ("hidden_dropout", "attention_dropout"):
        if routed.get("cuda_graph_impl") == "local" and routed.get(name):
            # CudaGraphManager.__call__ replays what it captured in training whenever there is a graph.
            key = routed.key(name)
            raise _error(routed, "cuda_graph_impl", f"would evaluate with dropout; set {key}=0, or none")


def _predictions(routed: Routed) -> None:
    modules, together = routed.get("mtp_num_layers"), routed.get("recompute_num_layers")
    if modules is not None and modules < 1:
        raise _error(routed, "mtp_num_layers", "is not positive; set null")
    if modules and routed.get("recompute_method") == "uniform" and together not in (None, 1):
        raise _error(routed, "recompute_num_layers", "cannot be combined with model.mtp_num_layers; set 1")


def _losses(routed: Routed) -> None:
    """A coefficient of a balancing loss that the router does not have, and a fused loss that rounds."""
    kind = routed.get("moe_router_load_balancing_type")
    # "none" is how the loss is turned off whose coefficient came with the model.
    for name in _for_more(routed, "moe_aux_loss_coeff") if kind == "sinkhorn" else ():
        what = f"has no effect while moe_router_load_balancing_type is {shown(kind)}; set aux_loss or 0"
        raise _error(routed, name, what)
    if (routed.get("moe_expert_capacity_factor") or 0) < 0:
        raise _error(routed, "moe_expert_capacity_factor", "is below 0; set null to drop no tokens")
    half = routed.get("bf16") or routed.get("fp16")
    native = routed.given.get("cross_entropy_fusion_impl") == "native"
    if routed.get("cross_entropy_loss_fusion") and native and not half:  # it ends in grad_input.to(torch.bfloat16)
        raise _error(
            routed,
            "cross_entropy_fusion_impl",
            "rounds the gradient of a float32 loss to bfloat16; set te, or precision=bf16",
        )
    for name in _for_more(routed, "fp32_residual_connection") if not half else ():
        raise _error(routed, name, "has no effect in fp32; leave it out")


def _offloaded_optimizer(routed: Routed) -> None:
    """What HybridDeviceOptimizer needs: it casts the weights to float32 itself, and holds float32 moments."""
    if not routed.get("optimizer_cpu_offload"):
        return
    if routed.get("optimizer") == "sgd":
        raise _error(routed, "optimizer_cpu_offload", "is for Adam; set false, or optimizer.optimizer=adam")
    if not routed.get("use_precision_aware_optimizer"):
        raise _error(
            routed, "optimizer_cpu_offload", "needs optimizer.use_precision_aware_optimizer=true; set that too"
        )
    if not (routed.get("bf16") or routed.get("fp16")):
        raise _error(routed, "optimizer_cpu_offload", "needs 16-bit weights; set precision=bf16, or false")
    if not 0 < routed.get("optimizer_offload_fraction") <= 1:
        raise _error(
            routed, "optimizer_offload_fraction", "is not a fraction of the whole; set more than 0 and at most 1"
        )
    for name in _for_more(routed, "store_param_remainders main_params_dtype exp_avg_dtype exp_avg_sq_dtype"):
        raise _error(routed, name, "has no effect with optimizer_cpu_offload, which keeps float32; leave it out")
    for name in _for_more(routed, "decoupled_weight_decay"):
        raise _error(routed, name, "cannot be combined with optimizer_cpu_offload; set true")


RULES: tuple[Callable[[Routed], None], ...] = (
    _unread,
    _latent_attention,
    _groups,
    _graphs,
    _predictions,
    _losses,
    _offloaded_optimizer,
)
