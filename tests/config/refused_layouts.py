"""Layouts that break a rule, each with the beginning of its message. Numbers are worked out by hand."""

from typing import Any

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
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WORLD_FORMULA = f"processes % ({TP} x {PP} x {CP}) must be 0"


def modules(*names: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(names)}


# keys of the parallelism section (and `model`), sizes of the run, part of the message
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
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|t*6L"},
        {"world_size": 2},
        "parallelism.pipeline_model_parallel_layout: t (decoder) must be there 12 times (num_layers), but Et*5|t*6L "
        "has 11; set a layout with 12",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|Lt*7"},
        {"world_size": 2},
        "parallelism.pipeline_model_parallel_layout: the order must be E t m L, but is EtttttLttttttt; set it",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|t*7xL"},
        {"world_size": 2},
        "parallelism.pipeline_model_parallel_layout: 'x' is no part of a model; set a layout of E (embedding), t (",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|t*7L", "num_layers_in_first_pipeline_stage": 5},
        {"world_size": 2},
        "parallelism.num_layers_in_first_pipeline_stage: does not go with pipeline_model_parallel_layout; set one",
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
        f"parallelism.{ETP}: with EP = 1, ETP = TP must hold or the ranks' experts drift apart, but 1 != 2; "
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
        {ETP: 2, "model": EXPERTS},
        {"world_size": 2},
        f"parallelism.{ETP}: with EP = 1, ETP = TP must hold or the ranks' experts drift apart, but 2 != 1; "
        f"set parallelism.{ETP} to 1",
    ),
    (
        {EP: 2, "moe_token_dispatcher_type": "allgather", "variable_seq_lengths": True, "model": EXPERTS},
        {"world_size": 2},
        "parallelism.moe_token_dispatcher_type: allgather needs ranks with equally many tokens",
    ),
    (
        {EP: 2, "use_cpu_initialization": True, "model": EXPERTS},
        {"world_size": 2},
        "parallelism.use_cpu_initialization: gives all 2 EP ranks the same experts; set it to false",
    ),
    # recomputation
    (
        {"recompute_modules": ["mlp"]},
        {},
        "parallelism.recompute_modules: ['mlp'] has no effect with recompute_granularity=null; "
        "set parallelism.recompute_granularity=selective, or parallelism.recompute_modules to null",
    ),
    (
        {"recompute_granularity": "selective", "recompute_num_layers": 1},
        {},
        "parallelism.recompute_num_layers: 1 has no effect with recompute_granularity=selective; "
        "set parallelism.recompute_granularity=full, or parallelism.recompute_num_layers to null",
    ),
    (
        {"recompute_granularity": "full", "recompute_method": "uniform"},
        {},
        "parallelism.recompute_granularity: full needs recompute_method and recompute_num_layers",
    ),
    (
        {**RECOMPUTED, "distribute_saved_activations": True},
        {},
        "parallelism.distribute_saved_activations: divides activations over tensor ranks, but TP = 1; set it to false",
    ),
    (
        {TP: 2, "sequence_parallel": True, **RECOMPUTED, "distribute_saved_activations": True},
        {"world_size": 2},
        "parallelism.distribute_saved_activations: divides activations over tensor ranks, but sequence_parallel",
    ),
    ({**modules("attention")}, {}, "parallelism.recompute_modules: no module is called 'attention'; set some of core_"),
    (
        modules("moe"),
        {},
        "parallelism.recompute_modules: moe needs a model with model.num_moe_experts; set it without moe",
    ),
    (
        {**modules("mlp"), "model": EXPERTS},
        {},
        "parallelism.recompute_modules: mlp is the MLP of layers without experts, of which there are none; set moe",
    ),
    # optimizer
    (
        {"overlap_param_gather": True},
        {},
        "parallelism.overlap_param_gather: True needs use_distributed_optimizer=true, which is false; "
        "set parallelism.use_distributed_optimizer to true",
    ),
    (
        {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 2},
        {"world_size": 3},
        "parallelism.num_distributed_optimizer_instances: DP x CP % num_distributed_optimizer_instances must be 0, "
        "but 3 % 2 = 1; set parallelism.num_distributed_optimizer_instances to 1 or 3",
    ),
    (
        {"average_in_collective": True},
        {},
        "parallelism.average_in_collective: an average over ranks is no mean over tokens, which the loss is here "
        "(calculate_per_token_loss); set it to false",
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
