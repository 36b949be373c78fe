"""Overlapped communication: what each key waits for. tests/training/test_settings.py builds and runs what is legal."""

from typing import Any

import pytest

from bridge.config import effect, layout, routing
from bridge.config.schema import Train
from bridge.errors import ConfigError
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
        section = "model" if name in MODEL else effect.home(name, {}).split(".")[0]
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
        "parallelism.overlap_param_gather: True needs use_distributed_optimizer=true, which is false; "
        "set parallelism.use_distributed_optimizer to true, or leave it out",
    ),
    (
        {"use_distributed_optimizer": True, "overlap_param_gather": True},
        "parallelism.overlap_param_gather: True needs overlap_grad_reduce=true",
    ),
    ({**VPP2, "align_param_gather": True}, "parallelism.align_param_gather: True needs overlap_param_gather=true"),
    (
        {**GATHERED, "align_param_gather": True},
        "parallelism.align_param_gather: True has no effect while virtual_pipeline_model_parallel_size is 1; "
        "leave it out, or set parallelism.virtual_pipeline_model_parallel_size to 2 or more",
    ),
    (
        {**GATHERED, "overlap_param_gather_with_optimizer_step": True},
        "optimizer.overlap_param_gather_with_optimizer_step: True has no effect while virtual_pipeline",
    ),
    ({"bucket_size": 1000}, "parallelism.bucket_size: 1000 needs overlap_grad_reduce=true, which is false"),
    ({"pad_buckets_for_high_nccl_busbw": True}, "parallelism.pad_buckets_for_high_nccl_busbw: True needs use_dist"),
    (
        {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, "reduce_scatter_with_fp32_accumulation": True},
        "parallelism.reduce_scatter_with_fp32_accumulation: True needs grad_reduce_in_fp32=false, which is true",
    ),
    ({"overlap_p2p_comm": True}, "parallelism.overlap_p2p_comm: True has no effect while virtual_pipeline"),
    ({"batch_p2p_comm": False}, "parallelism.batch_p2p_comm: False has no effect while pipeline_model_parallel_size"),
    (
        {**PP2, "batch_p2p_comm": False, "batch_p2p_sync": False},
        "parallelism.batch_p2p_sync: False needs batch_p2p_comm=true, which is false",
    ),
    (
        {"tp_comm_overlap": True},
        "parallelism.tp_comm_overlap: True has no effect while tensor_model_parallel_size is 1; "
        "leave it out, or set parallelism.tensor_model_parallel_size to 2 or more",
    ),
    ({**TP2, "tp_comm_overlap": True}, "parallelism.tp_comm_overlap: True needs sequence_parallel=true"),
    ({**SP2, "tp_comm_overlap": True}, "parallelism.tp_comm_overlap: True needs 16-bit weights; set precision=bf16"),
    ({"tp_comm_bulk_wgrad": False}, "parallelism.tp_comm_bulk_wgrad: False has no effect while tp_comm_overlap is"),
    (
        {"tp_comm_overlap_cfg": {"fc1_fprop": {"num_sm": 2}}},
        "parallelism.tp_comm_overlap_cfg: {'fc1_fprop': {'num_sm': 2}} has no effect while tp_comm_overlap is false",
    ),
    (
        {**BUFFERS, "tp_comm_overlap_cfg": {"fc1": {"num_sm": 2}}},
        "parallelism.tp_comm_overlap_cfg.fc1: unknown key (value {'num_sm': 2}); known here: qkv_fprop,",
    ),
    (
        {**BUFFERS, "tp_comm_overlap_cfg": {"fc1_fprop": {"num_sms": 2}}},
        "parallelism.tp_comm_overlap_cfg.fc1_fprop.num_sms: unknown key (value 2); did you mean 'num_sm'?",
    ),
    (
        {**BUFFERS, "tp_comm_overlap_cfg": {"fc1_fprop": {"method": "ring"}}},
        "parallelism.tp_comm_overlap_cfg.fc1_fprop.method: 'ring' does not fit; set one of 'ring_exchange',",
    ),
    ({**BUFFERS, "tp_comm_split_ag": False}, "parallelism.tp_comm_split_ag: False is an old name that would change"),
    (
        {"defer_embedding_wgrad_compute": True},
        "parallelism.defer_embedding_wgrad_compute: True has no effect while pipeline_model_parallel_size is 1",
    ),
    (
        {**PP2, "defer_embedding_wgrad_compute": True},
        "parallelism.defer_embedding_wgrad_compute: True needs gradient_accumulation_fusion=true, which is false",
    ),
    ({**PP2, "wgrad_deferral_limit": 4}, "parallelism.wgrad_deferral_limit: 4 needs defer_embedding_wgrad_compute"),
    (
        {**EP2, "expert_model_parallel_size": 1},
        "parallelism.overlap_moe_expert_parallel_comm: True has no effect while expert_model_parallel_size is 1",
    ),
    ({**EP2, "moe_token_dispatcher_type": "allgather"}, "overlap_moe_expert_parallel_comm: True needs moe_token"),
    ({**EP2, "bf16": False}, "parallelism.overlap_moe_expert_parallel_comm: True needs 16-bit weights"),
    (
        {**EP2, "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        "overlap_moe_expert_parallel_comm: True needs recompute_granularity=null, which is full; "
        "set model.recompute_granularity to null or selective, or leave it out",
    ),
    (
        {**EP2, "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True},
        "overlap_moe_expert_parallel_comm: True needs moe_shared_expert_overlap=false, which is true",
    ),
    ({**EP2, "mtp_num_layers": 2}, "overlap_moe_expert_parallel_comm: True needs mtp_num_layers=null, which is 2"),
    ({**EP2, "mtp_num_layers": 1}, "overlap_moe_expert_parallel_comm: PP > 1 must hold with model.mtp_num_layers"),
    ({**EP2, **PP2}, "overlap_moe_expert_parallel_comm: VPP > 1 must hold with PP = 2, but VPP = 1; set parallelism."),
    (
        {**EXPERTS, "delay_wgrad_compute": True},
        "parallelism.delay_wgrad_compute: True needs overlap_moe_expert_parallel_comm=true, which is false",
    ),
    (
        {**EXPERTS, "moe_shared_expert_overlap": True},
        "model.moe_shared_expert_overlap: True has no effect while moe_shared_expert_intermediate_size is None",
    ),
    (
        {
            **EXPERTS,
            "moe_shared_expert_intermediate_size": 8,
            "moe_shared_expert_overlap": True,
            "moe_token_dispatcher_type": "allgather",
        },
        "model.moe_shared_expert_overlap: True needs moe_token_dispatcher_type=alltoall, which is allgather",
    ),
    # other keys without effect
    ({"moe_router_topk": 4}, "model.moe_router_topk: 4 has no effect while num_moe_experts is None; set model.num_moe"),
    ({"cpu_offloading_num_layers": 1}, "parallelism.cpu_offloading_num_layers: 1 has no effect while cpu_offloading"),
    (
        {"fp8_recipe": "tensorwise"},
        "precision.fp8_recipe: 'tensorwise' has no effect while fp8 is None; set precision.",
    ),
    ({**TENSORWISE, "fp8_margin": 1}, "precision.fp8_margin: 1 has no effect while fp8_recipe is 'tensorwise'; set"),
    (
        {**FP8, "fp8_recipe": "blockwise", "fp8_dot_product_attention": True},
        "precision.fp8_dot_product_attention: True has no effect while fp8_recipe is 'blockwise'; set precision",
    ),
    (
        {**GRAPHS, "hidden_dropout": 0.1},
        "cuda_graph_impl: 'local' would evaluate with dropout; set model.hidden_dropout=0",
    ),
    ({**FP8, "fp8_wgrad": False}, "precision.fp8_wgrad: False has no effect: Transformer Engine no longer reads it"),
    (
        {"cpu_offloading": True, "cpu_offloading_num_layers": 1, "cpu_offloading_activations": False},
        "parallelism.cpu_offloading_activations: False has no effect: Transformer Engine offloads activations and",
    ),
    (
        {**OPTIMIZER_OFFLOADED, "use_precision_aware_optimizer": False},
        "optimizer.optimizer_cpu_offload: True needs optimizer.use_precision_aware_optimizer=true; set that too",
    ),
    ({**OPTIMIZER_OFFLOADED, "optimizer_offload_fraction": 2.0}, "optimizer_offload_fraction: 2.0 is not a part of"),
    ({**OPTIMIZER_OFFLOADED, "bf16": False}, "optimizer.optimizer_cpu_offload: True needs 16-bit weights; set precisi"),
    ({**OPTIMIZER_OFFLOADED, "optimizer": "sgd"}, "optimizer.optimizer_cpu_offload: True is for Adam; set false"),
    (
        {**OPTIMIZER_OFFLOADED, "exp_avg_dtype": "bf16"},
        "optimizer.exp_avg_dtype: 'bf16' has no effect with optimizer_cpu_offload, which keeps float32; leave it out",
    ),
    (
        {**OPTIMIZER_OFFLOADED, "decoupled_weight_decay": False},
        "optimizer.decoupled_weight_decay: False does not go with optimizer_cpu_offload; set true",
    ),
    ({"sgd_momentum": 0.5}, "optimizer.sgd_momentum: 0.5 has no effect while optimizer is 'adam'; set optimizer."),
    (
        {"moe_layer_recompute": True},
        "model.moe_layer_recompute: True is an old name that would change other keys; set recompute_granularity=",
    ),
    ({"average_in_collective": True}, "parallelism.average_in_collective: an average over ranks is no mean"),
    (
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
        "parallelism.cross_entropy_fusion_impl: 'native' rounds the gradient of a float32 loss to bfloat16; set te",
    ),
]


@pytest.mark.parametrize(("asked", "expected"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused(asked: dict[str, Any], expected: str):
    pipelines = asked.get("pipeline_model_parallel_size", 1) * asked.get("expert_model_parallel_size", 1)
    with pytest.raises(ConfigError) as caught:
        check(asked, world_size=2 * pipelines)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
