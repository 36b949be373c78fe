"""A run that changes its layout at every second step goes on as the one that never did: weights, moments, loss scale,
schedule and data position of a checkpoint belong to no layout and to no kind of optimizer."""

from pathlib import Path
from typing import Any

import pytest

from bridge.models import hf_config
from tests import hf_models
from tests.distributed import run_distributed
from tests.training.runs import MODEL, Ran, config, losses, train

Layout = tuple[int, dict[str, Any]]

SHARDED = {"use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
LAYOUTS: dict[str, Layout] = {
    "one": (1, {}),
    "one_sharded": (1, SHARDED),
    "dp2": (2, {}),
    "dp2_sharded": (2, {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2": (2, TP2),
    "tp2_sharded": (2, {**TP2, **SHARDED}),
    "pp2": (2, PP2),
    "pp2_sharded": (2, {**PP2, **SHARDED}),
    "pp2_vpp2": (2, VPP2),
    "cp2_sharded": (2, {**CP2, **SHARDED}),
    "tp2_pp2": (4, {**TP2, **PP2}),
    "ep2": (2, EP2),
    "ep2_sharded": (2, {**EP2, **SHARDED}),
    "tp2_ep2": (2, {**TP2, **EP2}),
    "tp2_ep2_sharded": (2, {**TP2, **EP2, **SHARDED}),
    "tp2_etp2": (2, {**TP2, "expert_tensor_parallel_size": 2}),
    "pp2_ep2_sharded": (4, {**PP2, **EP2, **SHARDED}),
}
# Every pair of neighbours is a change of layout.
DENSE = "one tp2 pp2_sharded tp2_sharded pp2_vpp2 dp2_sharded tp2_pp2 cp2_sharded one one_sharded dp2".split()
EXPERTS = "one ep2 one ep2_sharded one_sharded tp2_ep2 pp2_vpp2 tp2_ep2_sharded tp2_etp2 pp2_ep2_sharded ep2 cp2_sharded"
LATENT = "one tp2_ep2_sharded pp2 ep2 cp2_sharded".split()
# The embedding is the output layer, too, and 99 tokens take another padding at another TP.
TIED = {**MODEL, "num_layers": 4, "vocab_size": 99, "share_embeddings_and_output_weights": True}
BFLOAT16 = {"params_dtype": "bf16", "pipeline_dtype": "bf16", "bf16": True}
FLOAT16 = {"params_dtype": "fp16", "pipeline_dtype": "fp16", "fp16": True, "initial_loss_scale": 2.0**20}


def moved_and_not(folder: Path, layouts: list[str], **options: Any) -> tuple[Ran, Ran]:
    """The run that takes two steps in each of `layouts`, and the one that takes all of them in the first."""
    steps = 2 * len(layouts)
    options["data"] = {"vocab_size": 99, "num_samples": 5}
    last = None
    for number, layout in enumerate(layouts):
        ranks, parallelism = LAYOUTS[layout]
        limits = {"steps": steps, "eval_interval": None, "exit_interval": 2}
        run = config(folder, name="moved", parallelism=parallelism, train=limits, **options)
        last = run_distributed(train, ranks, run)[0]
        assert last.step == 2 * (number + 1)
    ranks, parallelism = LAYOUTS[layouts[0]]
    straight = config(
        folder, name="straight", parallelism=parallelism, train={"steps": steps, "eval_interval": None}, **options
    )
    assert last is not None
    return last, run_distributed(train, ranks, straight)[0]


def assert_same(moved: Ran, straight: Ran, *, rel: float = 1e-5, norm: float = 1e-5) -> None:
    assert [line["step"] for line in moved.lines] == [line["step"] for line in straight.lines]
    assert losses(moved.lines) == pytest.approx(losses(straight.lines), rel=rel)
    norms, expected = ([line["grad_norm"] for line in ran.lines] for ran in (moved, straight))
    assert norms == pytest.approx(expected, rel=norm)
    assert [line["lr"] for line in moved.lines] == pytest.approx([line["lr"] for line in straight.lines], rel=1e-12)


def test_dense(tmp_path: Path):
    assert_same(*moved_and_not(tmp_path, DENSE, whole_model=TIED))
