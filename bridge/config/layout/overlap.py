"""Rules about communication that goes on while the device computes, and about messages between processes.

megatron-core switches some of these off by itself, reads some in some layouts only, and stops at others in a worker.
Here each says what it waits for.
"""

from typing import Any

from bridge.config import annotation, mcore_fields, sections
from bridge.config.layout.sizes import Layout
from bridge.config.routing import Routed
from bridge.errors import ConfigError, shown

# Keys that act only where the layout has more than one of something: the field of Layout, the key that says how many.
ALONE = (
    ("tp", "tensor_model_parallel_size", "tp_comm_overlap"),
    (
        "pp",
        "pipeline_model_parallel_size",
        "pipeline_model_parallel_comm_backend variable_seq_lengths batch_p2p_comm batch_p2p_sync "
        "deallocate_pipeline_outputs account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
        "defer_embedding_wgrad_compute",
    ),
    (
        "vpp",
        "virtual_pipeline_model_parallel_size",
        "overlap_p2p_comm overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage align_param_gather "
        "overlap_param_gather_with_optimizer_step",
    ),
    ("cp", "context_parallel_size", "cp_comm_type hierarchical_context_parallel_sizes"),
    ("ep", "expert_model_parallel_size", "overlap_moe_expert_parallel_comm"),
)
# key -> (another key, the values of it that it needs; the first one is proposed)
NEEDS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("overlap_param_gather", "use_distributed_optimizer", (True,)),
    ("overlap_param_gather", "overlap_grad_reduce", (True,)),
    ("align_param_gather", "overlap_param_gather", (True,)),
    ("overlap_param_gather_with_optimizer_step", "overlap_param_gather", (True,)),
    ("bucket_size", "overlap_grad_reduce", (True,)),
    ("pad_buckets_for_high_nccl_busbw", "use_distributed_optimizer", (True,)),
    ("reduce_scatter_with_fp32_accumulation", "use_distributed_optimizer", (True,)),
    ("reduce_scatter_with_fp32_accumulation", "grad_reduce_in_fp32", (False,)),
    ("reduce_scatter_with_fp32_accumulation", "num_distributed_optimizer_instances", (1,)),
    ("num_distributed_optimizer_instances", "use_distributed_optimizer", (True,)),
    ("batch_p2p_sync", "batch_p2p_comm", (True,)),
    ("overlap_p2p_comm_warmup_flush", "overlap_p2p_comm", (True,)),
    ("overlap_p2p_comm_warmup_flush", "batch_p2p_comm", (False,)),
    ("tp_comm_overlap", "sequence_parallel", (True,)),
    ("tp_comm_overlap", "multi_latent_attention", (False,)),  # its buffers are for qkv, proj, fc1 and fc2 alone
    ("defer_embedding_wgrad_compute", "gradient_accumulation_fusion", (True,)),
    ("wgrad_deferral_limit", "defer_embedding_wgrad_compute", (True,)),
    ("clone_scatter_output_in_embedding", "sequence_parallel", (True,)),
    ("overlap_moe_expert_parallel_comm", "moe_token_dispatcher_type", ("alltoall", "flex")),
    ("overlap_moe_expert_parallel_comm", "recompute_granularity", (None, "selective")),
    ("overlap_moe_expert_parallel_comm", "moe_shared_expert_overlap", (False,)),
    ("overlap_moe_expert_parallel_comm", "mtp_num_layers", (None, 1)),
    ("delay_wgrad_compute", "overlap_moe_expert_parallel_comm", (True,)),
    ("ep_overlap_early_attn_memory_release", "overlap_moe_expert_parallel_comm", (True,)),
    ("hierarchical_context_parallel_sizes", "cp_comm_type", ("a2a+p2p",)),
    ("moe_shared_expert_overlap", "moe_token_dispatcher_type", ("alltoall",)),
)
# Keys whose kernels exist in 16 bits only.
IN_HALF_PRECISION = ("tp_comm_overlap", "overlap_moe_expert_parallel_comm")
# The matrix products of a layer that Transformer Engine can overlap, and what may be set for each
# (transformer_engine/pytorch/module/base.py, initialize_ub).
PRODUCTS = tuple(f"{layer}_{way}" for layer in ("qkv", "proj", "fc1", "fc2") for way in ("fprop", "dgrad", "wgrad"))
OPTIONS = {
    "method": "Literal['ring_exchange', 'pipeline', 'bulk', 'external']",
    "is_reduce_scatter": "bool",
    "num_sm": "int",
    "cga_size": "int",
    "set_sm_margin": "bool",
    "num_splits": "int",
    "aggregate": "bool",
    "atomic_gemm": "bool",
    "use_ce": "bool",
    "fp8_buf": "bool",
    "comm_priority": "int",
    "gemm_priority": "int",
    "pipeline_rs_overlap_first_gemm": "bool",
}


def needs(routed: Routed, layout: Layout) -> None:
    """No key may be set that another one makes void, or that needs several processes where there is one."""
    defaults = mcore_fields.defaults()
    for axis, size, names in ALONE:
        for name in names.split() if getattr(layout, axis) == 1 else ():
            if routed.get(name) != defaults[name]:
                raise ConfigError(
                    f"{routed.key(name)}: {shown(routed.get(name))} has no effect while {size} is 1; "
                    f"leave it out, or set parallelism.{size} to 2 or more"
                )
    for name, needed, values in NEEDS:
        found = routed.get(needed)
        if found not in values and routed.get(name) != defaults[name]:
            raise ConfigError(
                f"{routed.key(name)}: {shown(routed.get(name))} needs {needed}={shown(values[0])}, but {needed} is "
                f"{shown(found)}; set {routed.key(needed)} to {' or '.join(map(shown, values))}, or "
                "leave it out"
            )
    for name in IN_HALF_PRECISION:
        if routed.get(name) and not (routed.get("bf16") or routed.get("fp16")):
            raise ConfigError(f"{routed.key(name)}: true needs 16-bit weights; set precision=bf16, or leave it out")


def experts_while_computing(routed: Routed, layout: Layout) -> None:
    """overlap_moe_expert_parallel_comm: what it needs of the pipeline."""
    if not routed.get("overlap_moe_expert_parallel_comm"):
        return
    key = routed.key("overlap_moe_expert_parallel_comm")
    if layout.pp > 1 and layout.vpp == 1:
        raise ConfigError(
            f"{key}: VPP > 1 must hold with PP = {layout.pp}, but VPP = 1; "
            "set parallelism.virtual_pipeline_model_parallel_size to 2 or more, or leave it out"
        )
    if layout.pp == 1 and routed.get("mtp_num_layers") is not None:
        raise ConfigError(f"{key}: PP > 1 must hold with model.mtp_num_layers, but PP = 1; leave one of the two out")


def tensor_parallel_buffers(routed: Routed, layout: Layout) -> None:
    """tp_comm_overlap and the keys that describe it."""
    defaults = mcore_fields.defaults()
    for name in (name for name in routed.given if name.startswith("tp_comm_")):
        if routed.get(name) != defaults.get(name) and not routed.get("tp_comm_overlap"):
            raise ConfigError(
                f"{routed.key(name)}: {shown(routed.get(name))} has no effect while tp_comm_overlap is false; "
                "set parallelism.tp_comm_overlap to true, or leave it out"
            )
    key = routed.key("tp_comm_overlap_cfg")
    for product, options in routed.get("tp_comm_overlap_cfg", {}).items():
        annotation.check(f"{key}.{product}", options, "dict[str, Any]")
        if product not in PRODUCTS:
            raise sections.unknown_key(f"{key}.{product}", options, PRODUCTS)
        for name, value in options.items():
            if name not in OPTIONS:
                raise sections.unknown_key(f"{key}.{product}.{name}", value, OPTIONS)
            annotation.check(f"{key}.{product}.{name}", value, OPTIONS[name])
