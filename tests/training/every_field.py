"""A value other than the default for every field of megatron-core's configuration classes, and where it can act."""

from typing import Any

from bridge.config import annotation, mcore_fields, own_fields, routing

EXPERTS = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.01,
    "add_bias_linear": False,
}
WITH_SHARED_EXPERTS = {**EXPERTS, "moe_shared_expert_intermediate_size": 16}
LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "kv_channels": None,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
}
FULL = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SHARDED = {"use_distributed_optimizer": True}
GATHERED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP2 = {"tensor_model_parallel_size": 2}
SP2 = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {
    **PP2,
    "num_layers": 4,
    "virtual_pipeline_model_parallel_size": 2,
    "overlap_p2p_comm": True,
    "batch_p2p_comm": False,
}
CP2 = {"context_parallel_size": 2}
BF16 = {"bf16": True, "params_dtype": "bf16", "pipeline_dtype": "bf16"}
FP8 = {**BF16, "fp8": "hybrid"}
TENSORWISE = {**FP8, "fp8_recipe": "tensorwise"}
PRECISION_AWARE = {**BF16, "use_distributed_optimizer": True, "use_precision_aware_optimizer": True}
OFFLOADED = {"cpu_offloading": True, "cpu_offloading_num_layers": 1}
MODULES_OFFLOADED = {**BF16, "fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}
OPTIMIZER_OFFLOADED = {**PRECISION_AWARE, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
GRAPHS = {**BF16, "cuda_graph_impl": "local", "use_te_rng_tracker": True}
GROUPED = {**EXPERTS, **BF16, "moe_grouped_gemm": True}
MIXED = {**EXPERTS, **BF16, "expert_model_parallel_size": 2, "overlap_moe_expert_parallel_comm": True}
FP16 = {"fp16": True, "params_dtype": "fp16", "pipeline_dtype": "fp16"}

# field -> value, where the first one that fits its type is no good here
VALUES: dict[str, Any] = {
    "activation_func": "gelu",
    "attention_backend": "local",
    "autocast_dtype": "bf16",
    "context_parallel_size": 2,
    "cp_comm_type": "a2a",
    "cross_entropy_fusion_impl": "te",
    "cuda_graph_impl": "local",
    "cuda_graph_scope": "attn",
    "data_parallel_sharding_strategy": "optim",
    "decoupled_lr": 0.001,
    "decoupled_min_lr": 0.0001,
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
    "expert_tensor_parallel_size": 1,
    "experimental_attention_variant": "dsa",
    "ffn_hidden_size": 48,
    "ffn_hidden_size_by_layer": [32, 64],
    "fp4": "e2m1",
    "fp4_recipe": "custom",
    "fp8": "hybrid",
    "fp8_amax_compute_algo": "max",
    "fp8_recipe": "tensorwise",
    "hidden_size": 48,
    "hierarchical_context_parallel_sizes": [1, 2],
    "init_method_std": 0.01,
    "kitchen_attention_backend": "fa",
    "kv_channels": 16,
    "kv_lora_rank": 16,
    "lr": 0.005,
    "main_params_dtype": "fp16",
    "max_sequence_length": 64,
    "min_lr": 0.0005,
    "moe_aux_loss_coeff": 0.05,
    "moe_ffn_hidden_size": 24,
    "moe_flex_dispatcher_backend": "hybridep",
    "moe_latent_size": 16,
    "moe_layer_freq": 2,
    "moe_router_dtype": "fp64",
    "moe_router_group_topk": 1,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_router_num_groups": 2,
    "moe_router_score_function": "sigmoid",
    "moe_shared_expert_intermediate_size": 24,
    "moe_token_dispatcher_type": "allgather",
    "moe_token_drop_policy": "position",
    "mrope_section": [4, 4],
    "norm_placement": "sandwich",
    "normalization": "LayerNorm",
    "num_attention_heads": 8,
    "num_layers": 3,
    "num_moe_experts": 4,
    "optimizer_offload_fraction": 1.0,
    "num_query_groups": 1,
    "num_query_groups_by_layer": [2, 4],
    "offload_modules": ["core_attn"],
    "optimizer": "sgd",
    "params_dtype": "bf16",
    "pipeline_dtype": "bf16",
    "pipeline_model_parallel_comm_backend": "ucc",
    "pipeline_model_parallel_layout": "Et|tL",
    "position_embedding_type": "learned_absolute",
    "q_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "recompute_granularity": "selective",
    "recompute_method": "uniform",
    "recompute_modules": ["mlp"],
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "softmax_type": "learnable",
    "symmetric_ar_type": "one_shot",
    "tp_comm_bootstrap_backend": "gloo",
    "tp_comm_overlap_cfg": {"qkv_fprop": {"num_sm": 4}},
    "transformer_impl": "transformer_engine",
    "v_head_dim": 16,
    "vocab_size": 120,
    "window_attn_skip_freq": 2,
    "window_size": [4, 0],
}
# fields -> what must be set besides for them to act
TOGETHER: dict[str, dict[str, Any]] = {
    "apply_wd_to_qk_layernorm": {"qk_layernorm": True},
    "bf16 params_dtype pipeline_dtype fp32_residual_connection": BF16,
    "disable_bf16_reduced_precision_matmul": BF16,
    "fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis": FP16,
    "reduce_scatter_with_fp32_accumulation": {**BF16, **SHARDED, "grad_reduce_in_fp32": False},
    "bucket_size": {"overlap_grad_reduce": True},
    "overlap_param_gather": GATHERED,
    "pad_buckets_for_high_nccl_busbw": SHARDED,
    "num_distributed_optimizer_instances": SHARDED,
    "decoupled_min_lr": {"decoupled_lr": 0.001},
    "optimizer sgd_momentum": {"optimizer": "sgd"},
    "multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim": LATENT,
    "latent_layernorm_epsilon": LATENT,
    "mtp_loss_scaling_factor": {"mtp_num_layers": 1},
    "num_layers_in_first_pipeline_stage": {**PP2, "num_layers": 4},
    "num_layers_in_last_pipeline_stage": {**PP2, "num_layers": 4},
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split": {
        **PP2,
        "num_layers": 4,
        "account_for_embedding_in_pipeline_split": True,
        "account_for_loss_in_pipeline_split": True,
    },
    "position_embedding_type": {"rotary_base": 10000},
    "recompute_method recompute_num_layers": FULL,
    "distribute_saved_activations": {**FULL, **TP2},
    "recompute_modules": {"recompute_granularity": "selective"},
    "rope_local_base_freq window_attn_skip_freq": {"window_size": [4, 0]},
    "glu_linear_offset activation_func_clamp_value": {"gated_linear_unit": True},
    "expert_model_parallel_size": {**EXPERTS, "expert_model_parallel_size": 2},
    "overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release": MIXED,
    "expert_tensor_parallel_size": {**EXPERTS, **SP2, "expert_model_parallel_size": 2},
    "moe_aux_loss_coeff moe_ffn_hidden_size moe_input_jitter_eps moe_layer_freq": EXPERTS,
    "norm_topk_prob moe_norm_min moe_router_dtype moe_router_enable_expert_bias": EXPERTS,
    "moe_router_load_balancing_type moe_router_pre_softmax moe_router_score_function moe_router_topk": EXPERTS,
    "moe_router_force_load_balancing": EXPERTS,
    "moe_router_topk_scaling_factor moe_shared_expert_intermediate_size moe_token_dispatcher_type": EXPERTS,
    "moe_z_loss_coeff moe_expert_capacity_factor num_moe_experts": EXPERTS,
    "moe_apply_probs_on_input": {**EXPERTS, "moe_router_topk": 1, "moe_router_pre_softmax": True},
    "moe_pad_expert_input_to_capacity moe_token_drop_policy": {**EXPERTS, "moe_expert_capacity_factor": 1.0},
    "moe_router_bias_update_rate": {**EXPERTS, "moe_router_enable_expert_bias": True},
    "moe_router_group_topk moe_router_num_groups moe_router_group_score_topk": {
        **EXPERTS,
        "moe_router_group_topk": 1,
        "moe_router_num_groups": 2,
    },
    "moe_shared_expert_gate moe_shared_expert_overlap": WITH_SHARED_EXPERTS,
    "tensor_model_parallel_size": TP2,
    "sequence_parallel clone_scatter_output_in_embedding tp_comm_overlap": SP2,
    "pipeline_model_parallel_size pipeline_model_parallel_layout pipeline_model_parallel_comm_backend": PP2,
    "batch_p2p_comm batch_p2p_sync deallocate_pipeline_outputs variable_seq_lengths": PP2,
    "virtual_pipeline_model_parallel_size overlap_p2p_comm overlap_p2p_comm_warmup_flush": VPP2,
    "microbatch_group_size_per_vp_stage": VPP2,
    "align_param_gather overlap_param_gather_with_optimizer_step": {**VPP2, **GATHERED},
    "context_parallel_size cp_comm_type": CP2,
    # on a GPU
    "fp8 fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_param fp8_dot_product_attention": FP8,
    "fp8_recipe disable_parameter_transpose_cache": TENSORWISE,
    "tp_only_amax_red": FP8,
    "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16": {
        **TENSORWISE,
        "first_last_layers_bf16": True,
    },
    "moe_router_padding_for_quantization": {**GROUPED, **TENSORWISE},
    "moe_grouped_gemm moe_permute_fusion moe_router_fusion moe_latent_size": GROUPED,
    "use_fused_weighted_squared_relu": {**GROUPED, "activation_func": "squared_relu", "gated_linear_unit": False},
    "activation_func_fp8_input_store": {**BF16, "bias_activation_fusion": True},
    "apply_rope_fusion fused_single_qkv_rope use_te_activation_func": BF16,
    "apply_query_key_layer_scaling": FP16,
    "enable_autocast autocast_dtype": {"enable_autocast": True},
    "cpu_offloading cpu_offloading_num_layers cpu_offloading_double_buffering": OFFLOADED,
    "fine_grained_activation_offloading offload_modules min_offloaded_tensor_size": MODULES_OFFLOADED,
    "optimizer_cpu_offload optimizer_offload_fraction": OPTIMIZER_OFFLOADED,
    "overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params": OPTIMIZER_OFFLOADED,
    "use_precision_aware_optimizer store_param_remainders exp_avg_dtype exp_avg_sq_dtype": PRECISION_AWARE,
    "main_params_dtype": PRECISION_AWARE,
    "cuda_graph_impl cuda_graph_scope cuda_graph_warmup_steps cuda_graph_retain_backward_graph": GRAPHS,
    "use_te_rng_tracker": {},
    "cross_entropy_loss_fusion": {**BF16, "cross_entropy_loss_fusion": True},
    "cross_entropy_fusion_impl": {**BF16, "cross_entropy_loss_fusion": True},
    "disable_symmetric_registration": {"nccl_ub": True},
    "attention_backend": BF16,
    "hierarchical_context_parallel_sizes": {**CP2, "cp_comm_type": "a2a+p2p"},
}
# Fields that act on a GPU only, most of them in Transformer Engine's layers, or with a package that is not declared:
# refused here, in so many words.
NEEDS_GPU_NAMES = """
activation_func_fp8_input_store apply_query_key_layer_scaling apply_rope_fusion autocast_dtype batch_invariant_mode
cp_comm_type cpu_offloading cpu_offloading_double_buffering cpu_offloading_num_layers cross_entropy_fusion_impl
cross_entropy_loss_fusion cuda_graph_impl cuda_graph_retain_backward_graph cuda_graph_scope cuda_graph_warmup_steps
defer_embedding_wgrad_compute delay_wgrad_compute disable_parameter_transpose_cache disable_symmetric_registration
enable_autocast exp_avg_dtype exp_avg_sq_dtype fine_grained_activation_offloading first_last_layers_bf16
fp32_residual_connection fp4 fp4_param fp4_quantizer_factory fp4_recipe fp8 fp8_amax_compute_algo fp8_amax_history_len
fp8_dot_product_attention fp8_margin fp8_param fp8_quantizer_factory fp8_recipe fused_single_qkv_rope
gradient_accumulation_fusion hierarchical_context_parallel_sizes main_params_dtype min_offloaded_tensor_size
moe_deepep_num_sms moe_flex_dispatcher_backend moe_grouped_gemm moe_hybridep_num_sms moe_latent_size moe_permute_fusion
moe_router_fusion moe_router_padding_for_quantization nccl_ub num_distributed_optimizer_instances
num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 offload_modules optimizer_cpu_offload optimizer_offload_fraction
overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params pipeline_model_parallel_comm_backend store_param_remainders
tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_cfg
tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_only_amax_red
transformer_impl use_fused_weighted_squared_relu use_precision_aware_optimizer use_te_activation_func use_te_rng_tracker
wgrad_deferral_limit
"""
NEEDS_GPU = frozenset(NEEDS_GPU_NAMES.split())


def settings_of(name: str) -> dict[str, Any]:
    """The field's value and what must be set besides."""
    besides = next((settings for names, settings in TOGETHER.items() if name in names.split()), {})
    return {**besides, name: value_of(name)}


def names() -> list[str]:
    """Every field of the four classes and every argument of GPTModel, once."""
    return sorted(
        {name for fields in mcore_fields.targets().values() for name in fields} | own_fields.defaults().keys()
    )


def value_of(name: str) -> Any:
    """One that fits the field's type and is not its default."""
    if name in VALUES:
        return VALUES[name]
    declared = [fields[name] for fields in mcore_fields.targets().values() if name in fields]
    default = (mcore_fields.defaults() | own_fields.defaults()).get(name)
    text = routing._RETYPED.get(name) or own_fields.annotations().get(name)
    text = text or mcore_fields.checked_annotation(declared[0])
    for candidate in candidates(default):
        if candidate == default:
            continue
        try:
            annotation.check(name, candidate, text, mcore_fields.enums())
        except Exception:
            continue
        return candidate
    return "x"


def candidates(default: Any) -> list[Any]:
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 1]
    if isinstance(default, float):
        return [default / 2 or 0.5]
    return [True, 2, 0.5, "bf16", "x"]
