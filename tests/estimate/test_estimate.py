"""Counts against transformers and against hand counts, and the dry run's text."""

from typing import Any

import pytest

from bridge import estimate, parallel
from bridge.config import run_config
from bridge.config.run_config import RunConfig
from bridge.models import gpt
from bridge.training import flops
from tests import hf_models

MODEL: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 1001,
    "max_sequence_length": 128,
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "qk_layernorm": True,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_layer_freq": [0, 1, 1, 1]}
LAYER = 2 * 64 + 64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 176  # norms, QKV, output projection, gated MLP
TOTAL = 2 * 1001 * 64 + 4 * LAYER + 64
BF16 = {"bf16": True, "params_dtype": "bf16", "pipeline_dtype": "bf16", "grad_reduce_in_fp32": True}


def config(**sections: dict[str, Any]) -> RunConfig:
    """A run of MODEL: 8 sequences of 128 tokens per step, in micro-batches of 2."""
    return run_config.from_dict(
        {
            "name": "estimated",
            "model": MODEL | sections.get("model", {}),
            "parallelism": sections.get("parallelism", {}),
            "optimizer": {"optimizer": "adam", "lr": 1e-3} | sections.get("optimizer", {}),
            "precision": sections.get("precision", {"params_dtype": "fp32"}),
            "peft": {"method": "none"},
            "data": {"source": "mock", "sequence_length": 128},
            "train": {"global_batch_size": 8, "micro_batch_size": 2},
        }
    )


def test_parameters_by_hand():
    assert estimate.parameters(config()) == (TOTAL, TOTAL)


@pytest.mark.parametrize("variant", ["llama_tied", "llama_all_bias", "qwen2", "qwen3"])
def test_parameters_equal_transformers(variant: str, tmp_path):
    from bridge.models.hf import config as hf_config

    directory = hf_models.save(variant, tmp_path / variant, tokenizer=False)
    model = hf_config.to_mcore(hf_config.read(directory))
    expected = hf_models.model(variant).num_parameters()
    assert estimate.parameters(config(model=model)).total == expected


def test_experts_count_as_active_when_visited():
    experts = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "add_bias_linear": False}
    counted = estimate.parameters(config(model=experts))
    assert counted.total - counted.active == 4 * (8 - 2) * 3 * 64 * 32


def test_memory_of_one_process():
    (stage,) = estimate.memory(config(), world_size=1)
    assert (stage.weights, stage.gradients, stage.optimizer) == (4 * TOTAL, 4 * TOTAL, 8 * TOTAL)


def test_memory_of_half_precision_with_divided_optimizer():
    parallelism = {"use_distributed_optimizer": True}
    (stage,) = estimate.memory(config(precision=BF16, parallelism=parallelism), world_size=4)
    padded = TOTAL + 128  # to a multiple of 128 numbers, in parts of 64
    assert 2 * TOTAL <= stage.weights <= 2 * padded
    assert stage.gradients == 2 * stage.weights
    assert stage.optimizer == 12 * stage.weights // 2 // 4


@pytest.mark.parametrize(("settings", "per_parameter"), [({}, 12), ({"store_param_remainders": False}, 8)])
def test_precision_aware_optimizer_keeps_what_it_is_told(settings: dict[str, Any], per_parameter: int):
    """A fp32 copy of bf16 weights is the 16 bits that they lack, unless it is to be whole."""
    moments = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "use_precision_aware_optimizer": True}
    optimizer = moments | settings if settings else {}
    parallelism = {"use_distributed_optimizer": True}
    (stage,) = estimate.memory(config(precision=BF16, parallelism=parallelism, optimizer=optimizer), world_size=1)
    assert stage.optimizer == per_parameter * TOTAL
    if settings:
        (stage,) = estimate.memory(config(precision=BF16, parallelism=parallelism, optimizer=moments), world_size=1)
        assert stage.optimizer == 6 * TOTAL


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_what_the_cpu_holds_of_the_optimizer_is_not_on_the_device(fraction: float):
    """Of what stays, weights and moments are whole float32 numbers."""
    offloaded = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
    optimizer = {**offloaded, "optimizer_offload_fraction": fraction}
    parallelism = {"use_distributed_optimizer": True}
    (stage,) = estimate.memory(config(precision=BF16, parallelism=parallelism, optimizer=optimizer), world_size=1)
    assert stage.optimizer == pytest.approx(12 * TOTAL * (1 - fraction), abs=12)


def test_memory_of_tensor_and_pipeline_ranks():
    parallelism = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    first, last = estimate.memory(config(parallelism=parallelism), world_size=4)
    half_layer = (LAYER - 2 * 64) // 2 + 2 * 64
    half_embedding = 1002 // 2 * 64  # padded to a multiple of TP
    assert first.weights == 4 * (half_embedding + 2 * half_layer)
    assert last.weights == first.weights + 4 * 64  # the final norm
    assert first.activations != last.activations


@pytest.mark.parametrize("model", [LATENT, {**LATENT, **EXPERTS, "mtp_num_layers": 2, "q_lora_rank": None}])
def test_flops_of_latent_attention(model: dict[str, Any]):
    """Six per weight of a matrix a token meets: that of an expert counts by the share of tokens that choose it."""
    run = config(model=model)
    with parallel.single_process():
        (chunk,) = gpt.build(run.routed, meta=True)
    share = chunk.config.moe_router_topk / chunk.config.num_moe_experts if chunk.config.num_moe_experts else 1
    matrices = {name: weight.numel() for name, weight in chunk.named_parameters() if weight.dim() == 2}
    matrices["embedding.word_embeddings.weight"] = (chunk.config.mtp_num_layers or 0) * 1001 * 64  # the output layer
    met = sum(size * (share if ".experts." in name else 1) for name, size in matrices.items())
    layers = 4 + (chunk.config.mtp_num_layers or 0)
    found = flops.per_token(chunk.config, vocab_size=1001, sequence_length=128)
    assert found == pytest.approx(6 * met + 3 * layers * 4 * (24 + 16) * 128, rel=1e-12)


def test_flops_are_six_per_matrix_weight_and_causal_attention():
    matrices = TOTAL - 1001 * 64 - 9 * 64  # without the embedding look-up and the norms
    expected = 6 * matrices + 6 * 4 * 64 * 128
    text = estimate.report(config(), world_size=1)
    assert f"{expected / 1e9:,.3g} GFLOP per token" in text


def test_report_of_a_layout():
    parallelism = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    run = config(parallelism=parallelism, precision=BF16)
    text = estimate.report(run, world_size=8)
    assert "8 = TP 2 x PP 2 x CP 1 x DP 2" in text
    assert "2 x 2 sequences of 128 tokens" in text
    stages = estimate.memory(run, world_size=8, fused=True)
    rows = [[float(cell) for cell in line.split()] for line in text.splitlines() if line.split()[0] in ("0", "1")]
    assert rows == [[stage.stage, *(round(size / 2**30, 2) for size in (*stage[1:], stage.total))] for stage in stages]
    fullest = max(stages, key=lambda stage: stage.total).stage
    assert f"rank {4 * fullest} to {4 * fullest + 3} (stage {fullest})" in text


def test_a_machine_without_gpu_plans_for_one_with_transformer_engine():
    run = config(precision=BF16)
    text = estimate.report(run, world_size=1)
    assert "with Transformer Engine" in text
    assert "without Transformer Engine, as on this machine" in text
