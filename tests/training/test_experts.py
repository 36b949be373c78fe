"""Training with experts: loss and gradient norm of every step, and the biases that balance the experts, do not depend
on how model and batch are divided."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.weights import locate
from bridge.weights.dist_files import open_dist
from tests.distributed import run_distributed
from tests.training.runs import MODEL, Ran, config, losses, train

STEPS = 6
# A dense layer and one with a shared expert and four others, which a score and a bias choose.
EXPERTS: dict[str, Any] = {
    **MODEL,
    "family": "qwen3_moe",
    "num_moe_experts": 4,
    "moe_layer_freq": [0, 1],
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_topk": 2,
    "moe_router_dtype": "fp32",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
}
MODELS = {
    "megatron_core's_choice": {**EXPERTS, "moe_router_score_function": "sigmoid"},
    # Softmax scores and a bias, as ERNIE 4.5 has them.
    "own_choice": {**EXPERTS, "moe_norm_min": 1e-12, "moe_router_load_balancing_type": "seq_aux_loss"},
}
EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# name -> (processes, parallelism)
SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, EP2),
    "ep2_distributed_optimizer": (2, {**EP2, "use_distributed_optimizer": True}),
    "tp2_ep2": (2, {**TP2, **EP2, "expert_tensor_parallel_size": 1}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
}


def run(folder: Path, model: str, name: str, micro_batch_size: int = 1, **parallelism: Any) -> Any:
    """A run that starts from the weights which `start` saved after a step, and saves its last."""
    return config(
        folder,
        name=name,
        whole_model=MODELS[model],
        parallelism=parallelism,
        train={"steps": STEPS, "eval_interval": None, "micro_batch_size": micro_batch_size},
        init={"path": str(folder / "start")},
        checkpoint={"save_interval": STEPS},
    )


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Ran]:
    folder = tmp_path_factory.mktemp("experts")
    options = {"steps": 5, "exit_interval": 1, "eval_interval": None}
    run_distributed(train, 1, config(folder, name="start", whole_model=MODELS[request.param], train=options))
    return folder, request.param, run_distributed(train, 1, run(folder, request.param, "reference"))[0]


def biases(run_dir: Path) -> torch.Tensor:
    dist = open_dist(locate.locate(run_dir).directory)
    return dist.read("decoder.layers.1.mlp.router.expert_bias").clone()


@pytest.mark.parametrize("split", SPLITS)
def test_training_does_not_depend_on_the_split(reference: tuple[Path, str, Ran], split: str):
    folder, model, expected = reference
    ranks, parallelism = SPLITS[split]
    result = run_distributed(train, ranks, run(folder, model, split, **parallelism))[0]
    assert_same(result, expected)
    ours, theirs = biases(folder / split), biases(folder / "reference")
    assert theirs.any()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("reference", ["own_choice"], indirect=True)
def test_balance_within_a_sequence_does_not_depend_on_sequences_at_a_time(reference: tuple[Path, str, Ran]):
    folder, model, expected = reference
    assert_same(run_distributed(train, 1, run(folder, model, "two", micro_batch_size=2))[0], expected)


def assert_same(result: Ran, expected: Ran) -> None:
    assert losses(result.lines) == pytest.approx(losses(expected.lines), rel=1e-5)
    norms = [[line["grad_norm"] for line in ran.lines if "loss" in line] for ran in (result, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
