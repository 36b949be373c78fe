"""Layouts that break a rule, and what each message must say (messages.py). Numbers are worked out by hand."""

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


def modules(*names: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(names)}


# keys of the parallelism section (and `model`), sizes of the run, what the message must say
REFUSED = [
    # world size
    (
        {TP: 2},
        {},
        f"parallelism.{TP}: ... 1 % (2 x 1 x 1) = 1 ... train.num_devices to 2, or parallelism.{TP} to 1",
    ),
    (
        {TP: 2, PP: 2},
        {"world_size": 6},
        f"parallelism.{TP}: ... 6 % (2 x 2 x 1) = 2 ... "
        f"train.num_devices to 4 or 8, or parallelism.{TP} to 1 or 3, or parallelism.{PP} to 1 or 3",
    ),
    ({TP: 0}, {}, f"parallelism.{TP}: 0 ... from 1 up"),
    # tensor parallel
    (
        {TP: 8},
        {"world_size": 8},
        f"parallelism.{TP}: ... 12 % 8 = 4 ... model.num_attention_heads to 8 or 16, or parallelism.{TP} to 6 or 12",
    ),
    (
        {TP: 4},
        {"world_size": 4},
        f"parallelism.{TP}: ... 6 % 4 = 2 and 4 % 6 = 4 ... parallelism.{TP} to 3 or 6",
    ),
    (
        {TP: 3, "model": {"ffn_hidden_size": 100}},
        {"world_size": 3},
        f"parallelism.{TP}: ... 100 % 3 = 1 ... model.ffn_hidden_size to 99 or 102, or parallelism.{TP} to 2 or 4",
    ),
    (
        {"sequence_parallel": True},
        {},
        f"parallelism.sequence_parallel: ... TP = 1 ... false, or parallelism.{TP} to 2",
    ),
    (
        {"model": {"num_attention_heads": 7, "num_query_groups": 7}},
        {},
        "model.num_attention_heads: ... 96 % 7 = 5 ... "
        "model.hidden_size to 91 or 98, or model.num_attention_heads to 6 or 8",
    ),
    (
        {"model": {"num_query_groups": 5}},
        {},
        "model.num_query_groups: ... 12 % 5 = 2 ... "
        "model.num_attention_heads to 10 or 15, or model.num_query_groups to 4 or 6",
    ),
    # sequence
    (
        {},
        {"sequence_length": 200},
        "data.sequence_length: ... 200 > 128 ... "
        "data.sequence_length to 128 or less, or model.max_sequence_length to 200 or more",
    ),
    (
        {CP: 2},
        {"world_size": 2, "sequence_length": 66},
        f"parallelism.{CP}: ... 66 % (2 x 2) = 2 ... data.sequence_length to 64 or 68, or parallelism.{CP} to 1 or 3",
    ),
    (
        {TP: 3, "sequence_parallel": True},
        {"world_size": 3},
        f"parallelism.{TP}: ... 64 % (1 x 3) = 1 ... data.sequence_length to 63 or 66, or parallelism.{TP} to 2 or 4",
    ),
    # pipeline
    (
        {PP: 5},
        {"world_size": 5},
        f"parallelism.{PP}: ... 12 % (5 x 1) = 2 ... model.num_layers to 10 or 15, or parallelism.{PP} to 4 or 6",
    ),
    (
        {PP: 2, **INTERLEAVED, VPP: 4},
        {"world_size": 2},
        f"parallelism.{PP}: ... 12 % (2 x 4) = 4 ... "
        f"model.num_layers to 8 or 16, or parallelism.{PP} to 1 or 3, or parallelism.{VPP} to 3 or 6",
    ),
    ({VPP: 2}, {}, f"parallelism.{VPP}: ... PP = 1 and VPP = 2 ... null"),
    (
        {PP: 2, VPP: 2},
        {"world_size": 2},
        "overlap_p2p_comm: PP = 2 with VPP = 2 ... overlap_p2p_comm=false and batch_p2p_comm=true ... "
        "parallelism.overlap_p2p_comm=true and parallelism.batch_p2p_comm=false",
    ),
    (
        {PP: 2, "overlap_p2p_comm": True, "pipeline_model_parallel_layout": "Et*3|t*3|t*3|t*3L"},
        {"world_size": 2},
        "batch_p2p_comm: PP = 2 with VPP = 2 ... batch_p2p_comm=false",
    ),
    (
        {PP: 3, VPP: 2, "overlap_p2p_comm": True},
        {"world_size": 3},
        "batch_p2p_comm: VPP = 2 ... overlap_p2p_comm=true ... batch_p2p_comm=false",
    ),
    (
        {PP: 2, "overlap_p2p_comm": True},
        {"world_size": 2},
        "parallelism.overlap_p2p_comm: ... VPP = 1",
    ),
    (
        {PP: 3, "num_layers_in_first_pipeline_stage": 3},
        {"world_size": 3},
        "parallelism.num_layers_in_first_pipeline_stage: ... 9 % (2 x 1) = 1",
    ),
    (
        {PP: 2, "num_layers_in_first_pipeline_stage": 4, "num_layers_in_last_pipeline_stage": 4},
        {"world_size": 2},
        "parallelism.num_layers_in_first_pipeline_stage: ... num_layers_in_last_pipeline_stage ... 4 ... 0 ... "
        "num_layers = 12, PP = 2",
    ),
    (
        {PP: 2, "num_layers_in_first_pipeline_stage": 5, "account_for_loss_in_pipeline_split": True},
        {"world_size": 2},
        "parallelism.num_layers_in_first_pipeline_stage: ... account_for_loss_in_pipeline_split=true",
    ),
    (
        {PP: 2, "account_for_loss_in_pipeline_split": True},
        {"world_size": 2},
        f"parallelism.{PP}: ... 13 % (2 x 1) = 1",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|t*4|t*3L"},
        {"world_size": 2},
        f"parallelism.{PP}: ... 3 % 2 = 1 ... parallelism.{PP} to 1 or 3",
    ),
    (
        {PP: 2, VPP: 3, "pipeline_model_parallel_layout": "Et*5|t*7L"},
        {"world_size": 2},
        f"parallelism.{VPP}: ... 2 / 2 = 1, not 3",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|t*6L"},
        {"world_size": 2},
        "parallelism.pipeline_model_parallel_layout: ... Et*5|t*6L has 11 ... a layout with 12",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|Lt*7"},
        {"world_size": 2},
        "parallelism.pipeline_model_parallel_layout: ... EtttttLttttttt",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|t*7xL"},
        {"world_size": 2},
        "parallelism.pipeline_model_parallel_layout: unknown symbol x; ... E (embedding), t (",
    ),
    (
        {PP: 2, "pipeline_model_parallel_layout": "Et*5|t*7L", "num_layers_in_first_pipeline_stage": 5},
        {"world_size": 2},
        "parallelism.num_layers_in_first_pipeline_stage: ... pipeline_model_parallel_layout",
    ),
    # experts
    ({EP: 2}, {"world_size": 2}, f"parallelism.{EP}: ... model.num_moe_experts ... 1"),
    (
        {EP: 4, "model": EXPERTS},
        {"world_size": 4},
        f"parallelism.{EP}: ... 6 % 4 = 2 ... model.num_moe_experts to 4 or 8, or parallelism.{EP} to 3 or 6",
    ),
    (
        {EP: 2, "model": EXPERTS},
        {"world_size": 3},
        f"parallelism.{EP}: ... 3 % (1 x 2 x 1) = 1 ... train.num_devices to 2 or 4, or parallelism.{EP} to 1 or 3",
    ),
    (
        {TP: 2, ETP: 1, "sequence_parallel": True, "model": EXPERTS},
        {"world_size": 2},
        f"parallelism.{ETP}: ... 1 != 2 ... parallelism.{ETP} to 2, or parallelism.{EP} to 2",
    ),
    (
        {TP: 2, "model": EXPERTS},
        {"world_size": 2},
        "parallelism.sequence_parallel: ... experts ... TP = 2",
    ),
    (
        {TP: 2, "model": {"multi_latent_attention": True}},
        {"world_size": 2},
        "parallelism.sequence_parallel: ... latent attention ... TP = 2",
    ),
    (
        {TP: 3, "sequence_parallel": True, "model": EXPERTS},
        {"world_size": 3, "sequence_length": 63},
        f"parallelism.{ETP}: ... 40 % 3 = 1 ... model.moe_ffn_hidden_size to 39 or 42, or parallelism.{ETP} to 2 or 4",
    ),
    (
        {TP: 2, "sequence_parallel": True, "model": EXPERTS | {"add_bias_linear": True}},
        {"world_size": 2},
        f"parallelism.{ETP}: ... ETP = 2",
    ),
    (
        {ETP: 2, "model": EXPERTS},
        {"world_size": 2},
        f"parallelism.{ETP}: ... 2 != 1 ... parallelism.{ETP} to 1",
    ),
    (
        {EP: 2, "moe_token_dispatcher_type": "allgather", "variable_seq_lengths": True, "model": EXPERTS},
        {"world_size": 2},
        "parallelism.moe_token_dispatcher_type: allgather ... alltoall",
    ),
    # recomputation
    (
        {"recompute_modules": ["mlp"]},
        {},
        "parallelism.recompute_modules: ... recompute_granularity=null ... "
        "parallelism.recompute_granularity=selective, or parallelism.recompute_modules to null",
    ),
    (
        {"recompute_granularity": "selective", "recompute_num_layers": 1},
        {},
        "parallelism.recompute_num_layers: ... recompute_granularity=selective ... "
        "parallelism.recompute_granularity=full, or parallelism.recompute_num_layers to null",
    ),
    (
        {"recompute_granularity": "full", "recompute_method": "uniform"},
        {},
        "parallelism.recompute_granularity: full ... recompute_method and recompute_num_layers",
    ),
    (
        {**RECOMPUTED, "distribute_saved_activations": True},
        {},
        "parallelism.distribute_saved_activations: ... TP = 1 ... false",
    ),
    (
        {TP: 2, "sequence_parallel": True, **RECOMPUTED, "distribute_saved_activations": True},
        {"world_size": 2},
        "parallelism.distribute_saved_activations: ... sequence_parallel",
    ),
    ({**modules("attention")}, {}, "parallelism.recompute_modules: ... attention; ... core_attn"),
    (
        modules("moe"),
        {},
        "parallelism.recompute_modules: ... model.num_moe_experts ... without moe",
    ),
    (
        {**modules("mlp"), "model": EXPERTS},
        {},
        "parallelism.recompute_modules: mlp ... moe",
    ),
    # optimizer
    (
        {"overlap_param_gather": True},
        {},
        "parallelism.overlap_param_gather: ... use_distributed_optimizer=true ... "
        "parallelism.use_distributed_optimizer to true",
    ),
    (
        {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 2},
        {"world_size": 3},
        "parallelism.num_distributed_optimizer_instances: ... 3 % 2 = 1 ... "
        "parallelism.num_distributed_optimizer_instances to 1 or 3",
    ),
    (
        {"average_in_collective": True},
        {},
        "parallelism.average_in_collective: ... calculate_per_token_loss ... false",
    ),
    # batch
    (
        {},
        {"world_size": 2, "global_batch_size": 10, "micro_batch_size": 4},
        "train.micro_batch_size: ... 10 % (4 x 2) = 2 ... DP = ... 2 / (1 x 1 x 1) = 2 ... "
        "train.global_batch_size to 8 or 16, or train.micro_batch_size to 1 or 5",
    ),
    ({}, {"rampup_batch_size": [8, 4]}, "train.rampup_batch_size: [8, 4] ... [start, increment, samples]"),
    (
        {},
        {"rampup_batch_size": [48, 4, 10]},
        "train.rampup_batch_size: ... 48 > 24 ... start to 24 or less",
    ),
    (
        {},
        {"rampup_batch_size": [8, 5, 10]},
        "train.rampup_batch_size: ... 16 % 5 = 1",
    ),
    (
        {},
        {"rampup_batch_size": [6, 4, 10], "micro_batch_size": 4},
        "train.micro_batch_size: ... 6 % (4 x 1) = 2",
    ),
    (
        {PP: 2, **INTERLEAVED},
        {"world_size": 2, "global_batch_size": 3},
        "train.global_batch_size: ... 3 / (1 x 1) = 3 ... DP = ... 2 / (1 x 2 x 1) = 1 ... 2 or 4",
    ),
    (
        {PP: 2, **INTERLEAVED, "microbatch_group_size_per_vp_stage": 1},
        {"world_size": 2},
        "parallelism.microbatch_group_size_per_vp_stage: group >= PP must hold, but 1 < 2; set it to 2",
    ),
]
