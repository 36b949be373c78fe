"""Counts against transformers and against hand counts; activations against what autograd really keeps."""

from typing import Any

import pytest
import torch

from bridge import estimate, parallel, platform
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
    from bridge.models import hf_config

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
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * TOTAL, 4 * TOTAL, 12 * TOTAL // 4)


def test_memory_of_tensor_and_pipeline_ranks():
    parallelism = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    first, last = estimate.memory(config(parallelism=parallelism), world_size=4)
    half_layer = (LAYER - 2 * 64) // 2 + 2 * 64
    half_embedding = 1002 // 2 * 64  # padded to a multiple of TP
    assert first.weights == 4 * (half_embedding + 2 * half_layer)
    assert last.weights == first.weights + 4 * 64  # the final norm
    assert first.activations != last.activations


EVEN = {**LATENT, "v_head_dim": 24}  # values as wide as keys: torch's flash kernel takes no others on a CPU


@pytest.mark.parametrize("model", [{}, EVEN, {**EVEN, "mtp_num_layers": 1, "calculate_per_token_loss": True}])
def test_activations_are_what_autograd_keeps(model: dict[str, Any]):
    run = config(model=model)
    (stage,) = estimate.memory(run, world_size=1)
    with parallel.single_process():
        (chunk,) = gpt.build(run.routed())
        weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def remember(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.randint(1001, (2, 128), device=platform.device())
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            chunk(ids, torch.arange(128, device=ids.device).expand(2, -1), None, labels=ids)
        measured = sum(kept[key].untyped_storage().nbytes() for key in kept.keys() - weights)
    assert stage.activations == pytest.approx(measured, rel=0.1)


def test_full_recompute_keeps_one_input_per_layer():
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (kept,) = estimate.memory(config(), world_size=1)
    (recomputed,) = estimate.memory(config(parallelism=recompute), world_size=1)
    saved_layers = 3  # one of the four is kept whole while it is recomputed
    tokens, inputs = 2 * 128, 4 * 64 * 4
    per_layer = (kept.activations - recomputed.activations + tokens * inputs) / saved_layers / tokens / 4
    assert per_layer == pytest.approx(6 * 64 + 256 + 32 + 5 * 176, rel=0.01)


@pytest.mark.parametrize("model", [LATENT, {**LATENT, **EXPERTS, "mtp_num_layers": 2, "q_lora_rank": None}])
def test_flops_of_latent_attention(model: dict[str, Any]):
    """Six per weight of a matrix a token meets: that of an expert counts by the share of tokens that choose it."""
    run = config(model=model)
    with parallel.single_process():
        (chunk,) = gpt.build(run.routed(), meta=True)
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
    text = estimate.report(config(parallelism=parallelism), world_size=8)
    assert "8 = TP 2 x PP 2 x CP 1 x DP 2" in text
    assert "2 x 2 sequences of 128 tokens" in text
