"""Estimates against steps that were taken: live tensors and what autograd kept on every rank of a world on CPU, and the
peaks of an H200, with Transformer Engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from bridge import estimate
from bridge.config import layout, run_config
from bridge.config.run_config import RunConfig
from bridge.estimate import activations, pieces, stages
from tests.distributed import run_distributed
from tests.estimate import measured
from tests.training.runs import config

ROOT = Path(__file__).resolve().parents[2]
# Wide enough that what no formula counts, such as the cosines of positions, is around a hundredth.
MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": 503,
    "max_sequence_length": 256,
}
TIED = {"share_embeddings_and_output_weights": True}
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 128, "moe_router_dtype": "fp32"}
SHARED = EXPERTS | {"moe_shared_expert_intermediate_size": 128}
LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "kv_channels": None,
    "qk_layernorm": True,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 48,  # as wide as keys: torch's flash kernel takes no others on a CPU
}
BF16 = {"bf16": True, "params_dtype": "bf16", "pipeline_dtype": "bf16", "grad_reduce_in_fp32": True}
SHARDED = {"use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}
EP2 = {"expert_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MICRO_1 = {"micro_batch_size": 1}
BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 2}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


@dataclass(frozen=True)
class Case:
    world_size: int
    model: dict[str, Any] = field(default_factory=dict)
    parallelism: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    global_batch_size: int = 4


CASES = {
    "dense": Case(1),
    "sharded, small buckets": Case(2, TIED, SHARDED | {"overlap_grad_reduce": True, "bucket_size": 50000}, BF16),
    "bf16 gradients": Case(1, {}, {}, BF16 | {"grad_reduce_in_fp32": False}),
    "TP": Case(2, {"qk_layernorm": True}, TP2),
    "TP, whole sequences": Case(2, {}, {"tensor_model_parallel_size": 2}),
    "CP": Case(2, {}, {"context_parallel_size": 2}),
    "PP, tied, sharded": Case(4, TIED, PP2 | SHARDED, global_batch_size=8),
    "VPP": Case(2, {}, VPP2, global_batch_size=8),
    "MTP": Case(2, TIED | {"mtp_num_layers": 1}, PP2, global_batch_size=8),
    "full": Case(1, {}, FULL),
    "block": Case(1, {}, BLOCK),
    "mlp, layernorm": Case(1, {}, selective("mlp", "layernorm")),
    "experts": Case(2, {**SHARED, "moe_layer_freq": [0, 1, 1, 1]}, PP2, global_batch_size=8),
    # One micro-batch a rank: of several each rank holds its experts' fullest, which is more than the mean of all ranks.
    "EP, TP, sharded": Case(4, EXPERTS, EP2 | TP2 | SHARDED | {"expert_tensor_parallel_size": 1}),
    "EP, allgather": Case(2, EXPERTS | {"moe_token_dispatcher_type": "allgather"}, EP2),
    "experts again": Case(1, SHARED, selective("moe")),
    "capacity": Case(1, {**EXPERTS, "moe_expert_capacity_factor": 1.5, "moe_pad_expert_input_to_capacity": True}),
    "latent": Case(1, LATENT),
    "latent again": Case(1, LATENT, selective("mla_up_proj")),
    "scores, sandwich": Case(1, {"norm_placement": "sandwich", "attn_logit_softcapping": 50.0}),
}


def _kept(run: RunConfig, *, world_size: int) -> list[float]:
    """What autograd keeps on each stage by the formulas for torch's kernels."""
    routed = run.routed
    shape = layout.derive(routed, world_size=world_size)
    size, length = run.train.sequences_per_pass(shape.dp), run.data["sequence_length"]
    how = activations.use(routed, shape, sequence_length=length, micro_batch_size=size, fused=False)
    model = pieces.of(routed, shape)
    peaks = (
        stages.activation_peak(
            model,
            routed,
            how,
            chunks,
            stages.layers_of(model, how),
            stage=stage,
            micro_batches=run.train.global_batch_size // size // shape.dp,
        )
        for stage, chunks in enumerate(pieces.chunks(model, routed.transformer, shape))
    )
    return [peak.kept for peak in peaks]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_holds_what_was_estimated(case: Case, tmp_path: Path):
    """State to the byte; activations within 4%, averaged over ranks whose experts get more or fewer tokens."""
    run = config(
        tmp_path,
        model=MODEL | case.model,
        parallelism=case.parallelism,
        precision=case.precision,
        data={"sequence_length": 128, "vocab_size": 100, "num_samples": 64},
        train={"global_batch_size": case.global_batch_size, "micro_batch_size": 2},
    )
    ranks = run_distributed(measured.step, case.world_size, run, fresh=True)
    estimated = estimate.memory(run, world_size=case.world_size, fused=False)
    for stage, kept in zip(estimated, _kept(run, world_size=case.world_size), strict=True):
        found = [rank for rank in ranks if rank.stage == stage.stage]
        for part in ("weights", "gradients", "optimizer"):
            assert max(getattr(rank, part) for rank in found) == getattr(stage, part), part
        assert kept == pytest.approx(sum(rank.kept for rank in found) / len(found), rel=0.04)


class Peak(NamedTuple):
    """GiB that torch's allocator held at the most in a step, its own and state."""

    model: str
    peak: float
    settings: dict[str, Any]


def _again(granularity: str, *modules: str) -> dict[str, Any]:
    return {"parallelism": FULL if granularity == "full" else selective(*modules)}


# One H200, bf16, Transformer Engine 2.11, sequences of 4096 tokens if not said otherwise, micro-batches of 2.
PEAKS = [
    Peak("llama3_2_1b", 43.94, {"train": {"micro_batch_size": 4}}),
    Peak("llama3_2_1b", 66.6, {"train": {"micro_batch_size": 8}}),
    Peak("llama3_2_1b", 23.76, _again("full")),
    Peak("llama3_2_1b", 26.03, _again("selective", "mlp")),
    Peak("llama3_2_1b", 33.14, _again("selective", "core_attn")),
    Peak("llama3_2_1b", 30.23, {"precision": {"grad_reduce_in_fp32": False}}),
    Peak("llama3_2_1b", 35.92, {"model": {"cross_entropy_loss_fusion": False}}),
    Peak(
        "llama3_2_1b",
        25.62,
        {
            "parallelism": SHARDED,
            "optimizer": {
                "use_precision_aware_optimizer": True,
                "exp_avg_dtype": "bf16",
                "exp_avg_sq_dtype": "bf16",
            },
        },
    ),
    Peak("qwen3_1_7b", 47.19, {}),
    Peak("llama3_1_8b", 49.06, {"model": {"num_layers": 6}, "data": {"sequence_length": 8192}, "train": MICRO_1}),
    Peak("gpt2_xl", 36.99, {"data": {"sequence_length": 1024}, "train": {"micro_batch_size": 4}}),
    Peak("gemma3_1b", 40.32, {}),
    Peak("gemma2_2b", 20.44, {"model": {"num_layers": 4}, "data": {"sequence_length": 2048}, "train": MICRO_1}),
]


@pytest.mark.parametrize("case", PEAKS, ids=lambda case: f"{case.model} {case.peak}")
def test_peaks_of_an_h200(case: Peak):
    sections: dict[str, dict[str, Any]] = {
        "model": yaml.safe_load((ROOT / f"conf/model/{case.model}.yaml").read_text()),
        "precision": yaml.safe_load((ROOT / "conf/precision/bf16.yaml").read_text()),
        "optimizer": {"optimizer": "adam", "lr": 1e-3},
        "parallelism": {},
        "data": {"source": "mock", "sequence_length": 4096},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    changed = {name: section | case.settings.get(name, {}) for name, section in sections.items()}
    run = run_config.from_dict({"name": "measured", "peft": {"method": "none"}, **changed})
    (stage,) = estimate.memory(run, world_size=1, fused=True)
    assert stage.total / 2**30 == pytest.approx(case.peak, rel=0.03)
