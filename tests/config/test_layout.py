"""Layout rules. Numbers are worked out by hand; every refusal must show its formula and legal values near."""

from typing import Any

import pytest

from bridge.config import layout, routing
from bridge.config.layout import Layout, pipeline
from bridge.config.schema import Train
from bridge.errors import ConfigError

MODEL = {
    "family": "llama",
    "num_layers": 12,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_query_groups": 6,
    "ffn_hidden_size": 240,
    "vocab_size": 101,
    "max_sequence_length": 128,
    "add_bias_linear": False,
}
EXPERTS = {"num_moe_experts": 6, "moe_ffn_hidden_size": 40}
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP, ETP = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
INTERLEAVED = {VPP: 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}
WORLD_FORMULA = f"processes % ({TP} x {PP} x {CP}) must be 0"


def check(parallelism: dict[str, Any], *, model: dict[str, Any] | None = None, **sizes: Any) -> Layout:
    routed = routing.route(
        {"model": MODEL | (model or {}), "parallelism": parallelism, "precision": {"pipeline_dtype": "fp32"}}
    )
    sizes = {"world_size": 1, "sequence_length": 64, "global_batch_size": 24, "micro_batch_size": 1} | sizes
    world_size, sequence_length = sizes.pop("world_size"), sizes.pop("sequence_length")
    return layout.check(routed, world_size=world_size, sequence_length=sequence_length, train=Train(**sizes))


@pytest.mark.parametrize(
    ("parallelism", "sizes", "expected"),
    [
        ({}, {}, Layout(tp=1, pp=1, cp=1, ep=1, etp=1, dp=1, vpp=1, world_size=1)),
        ({}, {"world_size": 4}, Layout(tp=1, pp=1, cp=1, ep=1, etp=1, dp=4, vpp=1, world_size=4)),
        (
            {TP: 2, PP: 2, CP: 2, "sequence_parallel": True},
            {"world_size": 16},
            Layout(tp=2, pp=2, cp=2, ep=1, etp=2, dp=2, vpp=1, world_size=16),
        ),
        ({TP: 12}, {"world_size": 12}, Layout(tp=12, pp=1, cp=1, ep=1, etp=12, dp=1, vpp=1, world_size=12)),
        ({PP: 2, **INTERLEAVED}, {"world_size": 2}, Layout(1, 2, 1, 1, 1, dp=1, vpp=2, world_size=2)),
        ({PP: 3, VPP: 2}, {"world_size": 3}, Layout(1, 3, 1, 1, 1, dp=1, vpp=2, world_size=3)),
        ({PP: 3, "num_layers_in_first_pipeline_stage": 2}, {"world_size": 3}, Layout(1, 3, 1, 1, 1, 1, 1, 3)),
        (
            {PP: 2, "num_layers_in_first_pipeline_stage": 5, "num_layers_in_last_pipeline_stage": 7},
            {"world_size": 2},
            Layout(1, 2, 1, 1, 1, 1, 1, 2),
        ),
        (
            {PP: 2, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
            {"world_size": 2},
            Layout(1, 2, 1, 1, 1, 1, 1, 2),
        ),
        ({PP: 2, "pipeline_model_parallel_layout": "Et*5|t*7L"}, {"world_size": 2}, Layout(1, 2, 1, 1, 1, 1, 1, 2)),
        (
            {PP: 4, "pipeline_model_parallel_layout": "Et|(tt|)*5t|,L"},
            {"world_size": 4},
            Layout(1, 4, 1, 1, 1, 1, 2, 4),
        ),
        (
            {EP: 2, "model": EXPERTS},
            {"world_size": 4},
            Layout(tp=1, pp=1, cp=1, ep=2, etp=1, dp=4, vpp=1, world_size=4),
        ),
        (
            {TP: 2, ETP: 1, EP: 2, "sequence_parallel": True, "model": EXPERTS},
            {"world_size": 2},
            Layout(tp=2, pp=1, cp=1, ep=2, etp=1, dp=1, vpp=1, world_size=2),
        ),
        ({}, {"rampup_batch_size": [8, 4, 100], "micro_batch_size": 4}, Layout(1, 1, 1, 1, 1, 1, 1, 1)),
    ],
)
def test_legal_layout(parallelism: dict[str, Any], sizes: dict[str, Any], expected: Layout):
    parallelism = dict(parallelism)
    assert check(parallelism, model=parallelism.pop("model", None), **sizes) == expected


REFUSED = [
    # world size
    (
        {TP: 2},
        {},
        f"parallelism.{TP}: {WORLD_FORMULA}, but 1 % (2 x 1 x 1) = 1; "
        f"set train.num_devices to 2, or parallelism.{TP} to 1",
    ),
    (
        {TP: 2, PP: 2},
        {"world_size": 6},
        f"parallelism.{TP}: {WORLD_FORMULA}, but 6 % (2 x 2 x 1) = 2; "
        f"set train.num_devices to 4 or 8, or parallelism.{TP} to 1 or 3, or parallelism.{PP} to 1 or 3",
    ),
    ({TP: 0}, {}, f"parallelism.{TP}: 0 is not positive; set a whole number from 1 up"),
    # tensor parallel
    (
        {TP: 8},
        {"world_size": 8},
        f"parallelism.{TP}: num_attention_heads % {TP} must be 0, but 12 % 8 = 4; "
        f"set model.num_attention_heads to 8 or 16, or parallelism.{TP} to 6 or 12",
    ),
    (
        {TP: 4},
        {"world_size": 4},
        f"parallelism.{TP}: num_query_groups % TP or TP % num_query_groups must be 0, but 6 % 4 = 2 and 4 % 6 = 4; "
        f"set parallelism.{TP} to 3 or 6",
    ),
    (
        {TP: 3, "model": {"ffn_hidden_size": 100}},
        {"world_size": 3},
        f"parallelism.{TP}: ffn_hidden_size % {TP} must be 0, but 100 % 3 = 1; "
        f"set model.ffn_hidden_size to 99 or 102, or parallelism.{TP} to 2 or 4",
    ),
    (
        {"sequence_parallel": True},
        {},
        f"parallelism.sequence_parallel: TP > 1 must hold, but TP = 1; set it to false, or parallelism.{TP} to 2",
    ),
    (
        {"model": {"num_attention_heads": 7, "num_query_groups": 7}},
        {},
        "model.num_attention_heads: hidden_size % num_attention_heads must be 0, but 96 % 7 = 5; "
        "set model.hidden_size to 91 or 98, or model.num_attention_heads to 6 or 8",
    ),
    (
        {"model": {"num_query_groups": 5}},
        {},
        "model.num_query_groups: num_attention_heads % num_query_groups must be 0, but 12 % 5 = 2; "
        "set model.num_attention_heads to 10 or 15, or model.num_query_groups to 4 or 6",
    ),
    # sequence
    (
        {},
        {"sequence_length": 200},
        "data.sequence_length: sequence_length <= max_sequence_length must hold, but 200 > 128; "
        "set data.sequence_length to 128 or less, or model.max_sequence_length to 200 or more",
    ),
    (
        {CP: 2},
        {"world_size": 2, "sequence_length": 66},
        f"parallelism.{CP}: sequence_length % (2 x {CP}) must be 0, but 66 % (2 x 2) = 2; "
        f"set data.sequence_length to 64 or 68, or parallelism.{CP} to 1 or 3",
    ),
    (
        {TP: 3, "sequence_parallel": True},
        {"world_size": 3},
        f"parallelism.{TP}: sequence_length % ({CP} x {TP}) must be 0, but 64 % (1 x 3) = 1; "
        f"set data.sequence_length to 63 or 66, or parallelism.{TP} to 2 or 4",
    ),
    # pipeline
    (
        {PP: 5},
        {"world_size": 5},
        f"parallelism.{PP}: num_layers % ({PP} x {VPP}) must be 0, but 12 % (5 x 1) = 2; "
        f"set model.num_layers to 10 or 15, or parallelism.{PP} to 4 or 6",
    ),
    (
        {PP: 2, **INTERLEAVED, VPP: 4},
        {"world_size": 2},
        f"parallelism.{PP}: num_layers % ({PP} x {VPP}) must be 0, but 12 % (2 x 4) = 4; "
        f"set model.num_layers to 8 or 16, or parallelism.{PP} to 1 or 3, or parallelism.{VPP} to 3 or 6",
    ),
    ({VPP: 2}, {}, f"parallelism.{VPP}: PP > 1 must hold for VPP > 1, but PP = 1 and VPP = 2; set it to null"),
    (
        {PP: 2, VPP: 2},
        {"world_size": 2},
        "overlap_p2p_comm: PP = 2 with VPP = 2 computes wrong gradients, without an error, under "
        "overlap_p2p_comm=false and batch_p2p_comm=true; "
        "set parallelism.overlap_p2p_comm=true and parallelism.batch_p2p_comm=false",
    ),
    (
        {PP: 2, "overlap_p2p_comm": True, "pipeline_model_parallel_layout": "Et*3|t*3|t*3|t*3L"},
        {"world_size": 2},
        "batch_p2p_comm: PP = 2 with VPP = 2 computes wrong gradients",
    ),
    (
        {PP: 3, VPP: 2, "overlap_p2p_comm": True},
        {"world_size": 3},
        "batch_p2p_comm: VPP = 2 cannot run under overlap_p2p_comm=true",
    ),
    (
        {PP: 2, "overlap_p2p_comm": True},
        {"world_size": 2},
        "parallelism.overlap_p2p_comm: VPP > 1 must hold, but VPP = 1",
    ),
    (
        {PP: 3, "num_layers_in_first_pipeline_stage": 3},
        {"world_size": 3},
        "parallelism.num_layers_in_first_pipeline_stage: (num_layers - num_layers_in_first_pipeline_stage) % "
        f"(middle stages x {VPP}) must be 0, but 9 % (2 x 1) = 1",
    ),
    (
        {PP: 2, "num_layers_in_first_pipeline_stage": 4, "num_layers_in_last_pipeline_stage": 4},
        {"world_size": 2},
        "parallelism.num_layers_in_first_pipeline_stage: num_layers less num_layers_in_first_pipeline_stage and "
        "num_layers_in_last_pipeline_stage = 4 layers remain for 0 middle stages (num_layers = 12, PP = 2)",
    ),
    (
        {PP: 2, "num_layers_in_first_pipeline_stage": 5, "account_for_loss_in_pipeline_split": True},
        {"world_size": 2},
        "parallelism.num_layers_in_first_pipeline_stage: does not go with account_for_loss_in_pipeline_split=true",
    ),
    (
        {PP: 2, "account_for_loss_in_pipeline_split": True},
        {"world_size": 2},
        f"parallelism.{PP}: num_layers + 1 for the loss % ({PP} x {VPP}) must be 0, but 13 % (2 x 1) = 1",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|t*4|t*3L"},
        {"world_size": 2},
        f"parallelism.{PP}: stages of pipeline_model_parallel_layout % {PP} must be 0, but 3 % 2 = 1; "
        f"set parallelism.{PP} to 1 or 3",
    ),
    (
        {PP: 2, VPP: 3, "pipeline_model_parallel_layout": "Et*5|t*7L"},
        {"world_size": 2},
        f"parallelism.{VPP}: stages of pipeline_model_parallel_layout / PP = VPP must hold, but 2 / 2 = 1, not 3",
    ),
    # experts
    ({EP: 2}, {"world_size": 2}, f"parallelism.{EP}: 2 needs a model with model.num_moe_experts; set it to 1"),
    (
        {EP: 4, "model": EXPERTS},
        {"world_size": 4},
        f"parallelism.{EP}: num_moe_experts % {EP} must be 0, but 6 % 4 = 2; "
        f"set model.num_moe_experts to 4 or 8, or parallelism.{EP} to 3 or 6",
    ),
    (
        {EP: 2, "model": EXPERTS},
        {"world_size": 3},
        f"parallelism.{EP}: processes % ({ETP} x {EP} x {PP}) must be 0, but 3 % (1 x 2 x 1) = 1; "
        f"set train.num_devices to 2 or 4, or parallelism.{EP} to 1 or 3",
    ),
    (
        {TP: 2, ETP: 1, "sequence_parallel": True, "model": EXPERTS},
        {"world_size": 2},
        f"parallelism.{ETP}: with EP = 1, ETP >= TP must hold or the ranks' experts drift apart, but 1 < 2; "
        f"set parallelism.{ETP} to 2, or parallelism.{EP} to 2",
    ),
    (
        {TP: 2, "model": EXPERTS},
        {"world_size": 2},
        "parallelism.sequence_parallel: must be true for experts with TP > 1, but it is false with TP = 2",
    ),
    (
        {TP: 2, "model": {"multi_latent_attention": True}},
        {"world_size": 2},
        "parallelism.sequence_parallel: must be true for latent attention with TP > 1, but it is false with TP = 2",
    ),
    (
        {TP: 3, "sequence_parallel": True, "model": EXPERTS},
        {"world_size": 3, "sequence_length": 63},
        f"parallelism.{ETP}: moe_ffn_hidden_size % {ETP} must be 0, but 40 % 3 = 1; "
        f"set model.moe_ffn_hidden_size to 39 or 42, or parallelism.{ETP} to 2 or 4",
    ),
    (
        {TP: 2, "sequence_parallel": True, "model": EXPERTS | {"add_bias_linear": True}},
        {"world_size": 2},
        f"parallelism.{ETP}: ETP = 1 must hold for experts with biases, but ETP = 2",
    ),
    (
        {EP: 2, "use_cpu_initialization": True, "model": EXPERTS},
        {"world_size": 2},
        "parallelism.use_cpu_initialization: gives all 2 EP ranks the same experts; set it to false",
    ),
    # optimizer
    (
        {"overlap_param_gather": True},
        {},
        "parallelism.overlap_param_gather: True needs use_distributed_optimizer, which is false; "
        "set parallelism.use_distributed_optimizer to true",
    ),
    (
        {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 2},
        {"world_size": 3},
        "parallelism.num_distributed_optimizer_instances: DP x CP % num_distributed_optimizer_instances must be 0, "
        "but 3 % 2 = 1; set parallelism.num_distributed_optimizer_instances to 1 or 3",
    ),
    # batch
    (
        {},
        {"world_size": 2, "global_batch_size": 10, "micro_batch_size": 4},
        "train.micro_batch_size: global_batch_size % (micro_batch_size x DP) must be 0, but 10 % (4 x 2) = 2 "
        "(DP = processes / (TP x PP x CP) = 2 / (1 x 1 x 1) = 2); "
        "set train.global_batch_size to 8 or 16, or train.micro_batch_size to 1 or 5",
    ),
    ({}, {"rampup_batch_size": [8, 4]}, "train.rampup_batch_size: [8, 4] is not [start, increment, samples]"),
    (
        {},
        {"rampup_batch_size": [48, 4, 10]},
        "train.rampup_batch_size: start <= global_batch_size must hold, but 48 > 24; set start to 24 or less",
    ),
    (
        {},
        {"rampup_batch_size": [8, 5, 10]},
        "train.rampup_batch_size: (global_batch_size - start) % increment must be 0, but 16 % 5 = 1",
    ),
    (
        {},
        {"rampup_batch_size": [6, 4, 10], "micro_batch_size": 4},
        "train.micro_batch_size: start % (micro_batch_size x DP) must be 0, but 6 % (4 x 1) = 2",
    ),
    (
        {PP: 2, **INTERLEAVED},
        {"world_size": 2, "global_batch_size": 3},
        "train.global_batch_size: with VPP = 2, batch / (micro_batch_size x DP) must be a multiple of the 2 "
        "microbatches of a group, but 3 / (1 x 1) = 3 "
        "(DP = processes / (TP x PP x CP) = 2 / (1 x 2 x 1) = 1); set the batch to 2 or 4",
    ),
    (
        {PP: 2, **INTERLEAVED, "microbatch_group_size_per_vp_stage": 1},
        {"world_size": 2},
        "parallelism.microbatch_group_size_per_vp_stage: group >= PP must hold, but 1 < 2; set it to 2",
    ),
]


@pytest.mark.parametrize(("parallelism", "sizes", "expected"), REFUSED)
def test_refused_layout(parallelism: dict[str, Any], sizes: dict[str, Any], expected: str):
    parallelism = dict(parallelism)
    model = parallelism.pop("model", None)
    with pytest.raises(ConfigError) as caught:
        check(parallelism, model=model, **sizes)
    text = str(caught.value)
    assert expected in text
    assert "\n" not in text
    assert "; set " in text


def test_pipeline_needs_the_dtype_of_its_messages():
    routed = routing.route({"model": MODEL, "parallelism": {PP: 2}})
    with pytest.raises(ConfigError, match=r"^precision\.pipeline_dtype: is missing with PP = 2"):
        layout.check(routed, world_size=2, sequence_length=64, train=Train(global_batch_size=8))


def test_proposed_values_are_legal():
    """What a message proposes is accepted when tried."""
    assert check({TP: 6}, world_size=6).tp == 6
    assert check({PP: 4}, world_size=4).pp == 4
    assert check({PP: 6}, world_size=6).pp == 6
    assert check({CP: 2}, world_size=2, sequence_length=68).cp == 2
    assert check({EP: 3}, model=EXPERTS, world_size=3).ep == 3


def test_stages_are_counted_as_megatron_core_counts_them():
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    for spelled in ("Et*3|(tt|)*29,m|L", "xy".replace("xy", "Ett|ttL"), "E(t|)*4tL", "(Et|t)*2|L"):
        stages = len(PipelineParallelLayerLayout.parse_str_to_list(spelled))
        assert pipeline.count_stages(spelled) == stages
