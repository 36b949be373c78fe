"""Overlapped communication: what each key waits for. tests/training/test_settings.py builds and runs what is legal."""

from typing import Any

import pytest

from bridge.config import effect, layout, routing
from bridge.config.schema import Train
from bridge.errors import ConfigError
from tests.config.messages import says
from tests.training.every_field import (
    BF16,
    EXPERTS,
    FP8,
    GATHERED,
    GRAPHS,
    OPTIMIZER_OFFLOADED,
    PP2,
    SP2,
    TENSORWISE,
    TP2,
    VPP2,
)
from tests.training.runs import MODEL

EP2 = {**EXPERTS, **BF16, "expert_model_parallel_size": 2, "overlap_moe_expert_parallel_comm": True}
BUFFERS = {**SP2, **BF16, "tp_comm_overlap": True}


def check(asked: dict[str, Any], *, world_size: int = 2) -> None:
    sections: dict[str, Any] = {"model": dict(MODEL), "parallelism": {}, "optimizer": {}, "precision": {}}
    for name, value in ({"pipeline_dtype": "fp32"} | asked).items():
        section = "model" if name in MODEL else routing.home(name).split(".")[0]
        sections[section][name] = value
    routed = routing.route(sections)
    effect.check(routed)
    layout.check(routed, world_size=world_size, sequence_length=16, train=Train(global_batch_size=16))


LEGAL = [
    ({"overlap_grad_reduce": True, "bucket_size": 1000}, 2),
    (GATHERED, 2),
    (GATHERED, 1),  # the same command on a laptop: nothing is lost, there is nothing to wait for
    ({**VPP2, **GATHERED, "align_param_gather": True}, 2),
    ({**VPP2, **GATHERED, "overlap_param_gather_with_optimizer_step": True}, 4),
    ({**VPP2, "overlap_p2p_comm_warmup_flush": True}, 2),
    ({**PP2, "batch_p2p_comm": False}, 2),
    (EP2, 2),
    ({**EP2, **VPP2, "bf16": True}, 4),
    ({**EP2, "delay_wgrad_compute": True, "ep_overlap_early_attn_memory_release": True}, 2),
    ({**EXPERTS, "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True}, 1),
    (BUFFERS, 2),
    ({**BUFFERS, "tp_comm_overlap_rs": False, "tp_comm_overlap_disable_qkv": True}, 2),
    ({**BUFFERS, "tp_comm_overlap_cfg": {"fc1_fprop": {"method": "ring_exchange", "num_sm": 2}}}, 2),
    # other keys
    ({**FP8, "fp8_margin": 1}, 1),  # megatron-core's recipe is delayed unless it is told otherwise
    ({**FP8, "fp8_dot_product_attention": True}, 1),
    (OPTIMIZER_OFFLOADED, 1),
    (GRAPHS, 1),
]


@pytest.mark.parametrize(("asked", "world_size"), LEGAL)
def test_legal(asked: dict[str, Any], world_size: int):
    check(asked, world_size=world_size)


REFUSED = [
    (
        {"overlap_param_gather": True},
        "parallelism.overlap_param_gather: ... use_distributed_optimizer=true ... "
        "parallelism.use_distributed_optimizer to true",
    ),
    (
        {"use_distributed_optimizer": True, "overlap_param_gather": True},
        "parallelism.overlap_param_gather: ... overlap_grad_reduce=true",
    ),
    ({**VPP2, "align_param_gather": True}, "parallelism.align_param_gather: ... overlap_param_gather=true"),
    (
        {**GATHERED, "align_param_gather": True},
        "parallelism.align_param_gather: ... virtual_pipeline_model_parallel_size ... "
        "parallelism.virtual_pipeline_model_parallel_size to 2 or more",
    ),
    (
        {**GATHERED, "overlap_param_gather_with_optimizer_step": True},
        "optimizer.overlap_param_gather_with_optimizer_step: ... virtual_pipeline_model_parallel_size",
    ),
    ({"bucket_size": 1000}, "parallelism.bucket_size: ... overlap_grad_reduce=true"),
    (
        {"pad_buckets_for_high_nccl_busbw": True},
        "parallelism.pad_buckets_for_high_nccl_busbw: ... use_distributed_optimizer=true",
    ),
    (
        {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, "reduce_scatter_with_fp32_accumulation": True},
        "parallelism.reduce_scatter_with_fp32_accumulation: ... grad_reduce_in_fp32=false",
    ),
    ({"overlap_p2p_comm": True}, "parallelism.overlap_p2p_comm: ... virtual_pipeline_model_parallel_size"),
    ({"batch_p2p_comm": False}, "parallelism.batch_p2p_comm: ... pipeline_model_parallel_size"),
    (
        {**PP2, "batch_p2p_comm": False, "batch_p2p_sync": False},
        "parallelism.batch_p2p_sync: ... batch_p2p_comm=true",
    ),
    (
        {"tp_comm_overlap": True},
        "parallelism.tp_comm_overlap: ... tensor_model_parallel_size ... "
        "parallelism.tensor_model_parallel_size to 2 or more",
    ),
    ({**TP2, "tp_comm_overlap": True}, "parallelism.tp_comm_overlap: ... sequence_parallel=true"),
    ({**SP2, "tp_comm_overlap": True}, "parallelism.tp_comm_overlap: ... 16-bit weights ... precision=bf16"),
    ({"tp_comm_bulk_wgrad": False}, "parallelism.tp_comm_bulk_wgrad: ... tp_comm_overlap"),
    (
        {"tp_comm_overlap_cfg": {"fc1_fprop": {"num_sm": 2}}},
        "parallelism.tp_comm_overlap_cfg: ... fc1_fprop",
    ),
    (
        {**BUFFERS, "tp_comm_overlap_cfg": {"fc1": {"num_sm": 2}}},
        "parallelism.tp_comm_overlap_cfg.fc1: ... qkv_fprop,",
    ),
    (
        {**BUFFERS, "tp_comm_overlap_cfg": {"fc1_fprop": {"num_sms": 2}}},
        "parallelism.tp_comm_overlap_cfg.fc1_fprop.num_sms: ... 2 ... did you mean 'num_sm'?",
    ),
    (
        {**BUFFERS, "tp_comm_overlap_cfg": {"fc1_fprop": {"method": "ring"}}},
        "parallelism.tp_comm_overlap_cfg.fc1_fprop.method: ... ring ... ring_exchange",
    ),
    ({**BUFFERS, "tp_comm_split_ag": False}, "parallelism.tp_comm_split_ag: ... tp_comm_overlap_ag"),
    (
        {"defer_embedding_wgrad_compute": True},
        "parallelism.defer_embedding_wgrad_compute: ... pipeline_model_parallel_size",
    ),
    (
        {**PP2, "defer_embedding_wgrad_compute": True},
        "parallelism.defer_embedding_wgrad_compute: ... gradient_accumulation_fusion=true",
    ),
    ({**PP2, "wgrad_deferral_limit": 4}, "parallelism.wgrad_deferral_limit: ... defer_embedding_wgrad_compute"),
    (
        {**EP2, "expert_model_parallel_size": 1},
        "parallelism.overlap_moe_expert_parallel_comm: ... expert_model_parallel_size",
    ),
    (
        {**EP2, "moe_token_dispatcher_type": "allgather"},
        "overlap_moe_expert_parallel_comm: ... moe_token_dispatcher_type=alltoall",
    ),
    ({**EP2, "bf16": False}, "parallelism.overlap_moe_expert_parallel_comm: ... 16-bit weights"),
    (
        {**EP2, "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        "overlap_moe_expert_parallel_comm: ... recompute_granularity=null ... "
        "parallelism.recompute_granularity to null or selective, or leave it out",
    ),
    (
        {**EP2, "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True},
        "overlap_moe_expert_parallel_comm: ... moe_shared_expert_overlap=false",
    ),
    ({**EP2, "mtp_num_layers": 2}, "overlap_moe_expert_parallel_comm: ... mtp_num_layers=null"),
    ({**EP2, "mtp_num_layers": 1}, "overlap_moe_expert_parallel_comm: ... PP > 1 ... model.mtp_num_layers"),
    (
        {**EP2, **PP2},
        "overlap_moe_expert_parallel_comm: ... VPP = 1 ... parallelism.virtual_pipeline_model_parallel_size",
    ),
    (
        {**EXPERTS, "delay_wgrad_compute": True},
        "parallelism.delay_wgrad_compute: ... overlap_moe_expert_parallel_comm=true",
    ),
    (
        {**EXPERTS, "moe_shared_expert_overlap": True},
        "model.moe_shared_expert_overlap: ... moe_shared_expert_intermediate_size",
    ),
    (
        {
            **EXPERTS,
            "moe_shared_expert_intermediate_size": 8,
            "moe_shared_expert_overlap": True,
            "moe_token_dispatcher_type": "allgather",
        },
        "model.moe_shared_expert_overlap: ... moe_token_dispatcher_type=alltoall",
    ),
    # other keys without effect
    ({"moe_router_topk": 4}, "model.moe_router_topk: ... num_moe_experts ... model.num_moe_experts"),
    ({"cpu_offloading_num_layers": 1}, "parallelism.cpu_offloading_num_layers: ... cpu_offloading"),
    (
        {"fp8_recipe": "tensorwise"},
        "precision.fp8_recipe: ... tensorwise ... fp8 ... precision.fp8",
    ),
    ({**TENSORWISE, "fp8_margin": 1}, "precision.fp8_margin: ... fp8_recipe ... tensorwise ... precision.fp8_recipe"),
    (
        {**FP8, "fp8_recipe": "blockwise", "fp8_dot_product_attention": True},
        "precision.fp8_dot_product_attention: ... fp8_recipe ... blockwise ... precision.fp8_recipe",
    ),
    (
        {**GRAPHS, "hidden_dropout": 0.1},
        "cuda_graph_impl: ... local ... dropout ... model.hidden_dropout=0",
    ),
    ({**FP8, "fp8_wgrad": False}, "precision.fp8_wgrad: ... Transformer Engine"),
    (
        {"cpu_offloading": True, "cpu_offloading_num_layers": 1, "cpu_offloading_activations": False},
        "parallelism.cpu_offloading_activations: ... Transformer Engine",
    ),
    (
        {**OPTIMIZER_OFFLOADED, "use_precision_aware_optimizer": False},
        "optimizer.optimizer_cpu_offload: ... optimizer.use_precision_aware_optimizer=true",
    ),
    ({**OPTIMIZER_OFFLOADED, "optimizer_offload_fraction": 2.0}, "optimizer_offload_fraction: 2.0"),
    ({**OPTIMIZER_OFFLOADED, "bf16": False}, "optimizer.optimizer_cpu_offload: ... 16-bit weights ... precision=bf16"),
    ({**OPTIMIZER_OFFLOADED, "optimizer": "sgd"}, "optimizer.optimizer_cpu_offload: ... Adam ... false"),
    (
        {**OPTIMIZER_OFFLOADED, "exp_avg_dtype": "bf16"},
        "optimizer.exp_avg_dtype: ... optimizer_cpu_offload ... leave it out",
    ),
    (
        {**OPTIMIZER_OFFLOADED, "decoupled_weight_decay": False},
        "optimizer.decoupled_weight_decay: ... optimizer_cpu_offload ... true",
    ),
    ({"sgd_momentum": 0.5}, "optimizer.sgd_momentum: 0.5 ... adam ... optimizer.optimizer"),
    (
        {"moe_layer_recompute": True},
        "model.moe_layer_recompute: ... recompute_granularity=",
    ),
    ({"average_in_collective": True}, "parallelism.average_in_collective: ... calculate_per_token_loss"),
    (
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
        "parallelism.cross_entropy_fusion_impl: native rounds the gradient of a float32 loss to bfloat16; set te",
    ),
]


@pytest.mark.parametrize(("asked", "expected"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused(asked: dict[str, Any], expected: str):
    pipelines = asked.get("pipeline_model_parallel_size", 1) * asked.get("expert_model_parallel_size", 1)
    with pytest.raises(ConfigError) as caught:
        check(asked, world_size=2 * pipelines)
    assert says(expected, str(caught.value)), caught.value
