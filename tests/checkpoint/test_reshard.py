"""A run that changes its layout at every step goes on as the one that never did: weights, moments, loss scale,
schedule and data position of a checkpoint belong to no layout and to no kind of optimizer."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.models.hf import config as hf_config
from bridge.weights.dist_files import open_dist
from bridge.weights.locate import locate
from tests import hf_models
from tests.distributed import run_distributed
from tests.training.runs import EXPERTS as SMALL_EXPERTS
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
    "pp2_sharded": (2, {**PP2, **SHARDED, "num_layers_in_first_pipeline_stage": 1}),
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
DENSE = "one tp2 pp2_sharded tp2_sharded pp2_vpp2 dp2_sharded tp2_pp2 cp2_sharded one one_sharded"
EXPERTS = "one ep2 one ep2_sharded one_sharded tp2_ep2 pp2_vpp2 tp2_ep2_sharded tp2_etp2 pp2_ep2_sharded"
LATENT = "one tp2_ep2_sharded pp2 ep2 cp2_sharded"
# The embedding is the output layer, too, and 99 tokens take another padding at another TP.
TIED = {**MODEL, "num_layers": 4, "vocab_size": 99, "share_embeddings_and_output_weights": True}
EXPERT_MODEL = {**SMALL_EXPERTS, "num_layers": 4, "moe_layer_freq": [0, 1, 1, 1], "vocab_size": 99}
BFLOAT16 = {"params_dtype": "bf16", "pipeline_dtype": "bf16", "bf16": True}
# A first scale that overflows for a few steps: the scaler's counters matter.
FLOAT16 = {
    "params_dtype": "fp16",
    "pipeline_dtype": "fp16",
    "fp16": True,
    "initial_loss_scale": 2.0**17,
    "hysteresis": 1,
}


def moved_and_not(folder: Path, layouts: str, **options: Any) -> tuple[Ran, Ran]:
    """The run that takes a step in each of `layouts`, and the one that takes all of them in the first."""
    names = layouts.split()
    limits = {"steps": len(names), "eval_interval": None}
    options = {"data": {"vocab_size": 99, "num_samples": 5}, **options}
    for number, name in enumerate(names):
        ranks, parallelism = LAYOUTS[name]
        run = config(folder, name="moved", parallelism=parallelism, train={**limits, "exit_interval": 1}, **options)
        moved = run_distributed(train, ranks, run)[0]
        assert moved.step == number + 1
    ranks, parallelism = LAYOUTS[names[0]]
    straight = config(folder, name="straight", parallelism=parallelism, train=limits, **options)
    return moved, run_distributed(train, ranks, straight)[0]


def assert_same(moved: Ran, straight: Ran, *, rel: float = 1e-5, norm: float = 1e-5) -> None:
    (ours, theirs) = ([line for line in ran.lines if "loss" in line] for ran in (moved, straight))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert losses(ours) == pytest.approx(losses(theirs), rel=rel)
    assert moved.eval_loss == pytest.approx(straight.eval_loss, rel=rel)
    for name, tolerance in (("grad_norm", norm), ("lr", 1e-12), ("skipped", 0.0), ("consumed_samples", 0.0)):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=tolerance), name


def test_dense(tmp_path: Path):
    assert_same(*moved_and_not(tmp_path, DENSE, whole_model=TIED))


def test_experts(tmp_path: Path):
    """With a bias that balances the experts, which is no parameter and has no moments."""
    assert_same(*moved_and_not(tmp_path, EXPERTS, whole_model=EXPERT_MODEL), norm=1e-4)


def test_latent_attention_experts_and_a_prediction_module(tmp_path: Path):
    directory = hf_models.save("deepseek_v3", tmp_path / "hf", tokenizer=False)
    model = hf_config.to_mcore(hf_config.read(directory))
    data = {"vocab_size": 259, "num_samples": 5}
    options = {"whole_model": model, "data": data, "init": {"path": str(directory)}}
    assert_same(*moved_and_not(tmp_path, LATENT, **options), norm=5e-4)


def move(run: Any, target: Path) -> None:
    """Load the run's latest checkpoint in this layout, and save what was loaded."""
    from bridge import checkpoint, parallel
    from bridge.training import setup

    data = setup.prepare_data(run)
    parallel.initialize(run.routed.transformer, seed=run.train.seed)
    job = setup.build(run, data)
    checkpoint.Saver(target).save(job.state, progress=job.progress)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint; of embedding and output the rows of tokens: more are padding, as many as a layout needs."""
    dist = open_dist(directory)
    padded = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {key: dist.read(key)[: 99 if key.endswith(padded) else None].clone() for key in dist.tensors}


@pytest.mark.parametrize(
    ("layouts", "options"),
    [
        ("one_sharded pp2_sharded tp2 one", {"precision": BFLOAT16}),
        ("one_sharded tp2 dp2_sharded one", {"precision": FLOAT16}),
        ("tp2 pp2_vpp2", {"optimizer": {"optimizer": "sgd", "sgd_momentum": 0.9}}),
    ],
    ids=["bf16", "fp16", "sgd"],
)
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, layouts: str, options: dict[str, Any]):
    """Bit by bit, in every precision; training on cannot tell there, its rounding depends on the layout."""
    options = {**options, "data": {"vocab_size": 99}, "whole_model": TIED}
    limits = {"steps": 8, "exit_interval": 6, "eval_interval": None}
    run_distributed(train, 1, config(tmp_path, name="moved", train=limits, **options))
    first, latest = tmp_path / "moved" / "checkpoints", locate(tmp_path / "moved").directory
    expected, common = tensors(latest), torch.load(latest / "common.pt", weights_only=True)
    assert common["optimizer"]["step"] == (None if "sgd" in str(options) else 6 - common["progress"]["skipped"])
    if "fp16" in str(options):
        assert 0 < common["progress"]["skipped"] < 6
    for name in layouts.split():
        ranks, parallelism = LAYOUTS[name]
        run = config(tmp_path, name="moved", train=limits, parallelism=parallelism, **options)
        run_distributed(move, ranks, run, tmp_path / name)
        directory = locate(tmp_path / name).directory
        found, now = tensors(directory), torch.load(directory / "common.pt", weights_only=True)
        assert found.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert not different, (name, different)
        assert all(now[part] == common[part] for part in ("optimizer", "scheduler", "progress", "settings"))
        shutil.rmtree(first)
        (tmp_path / name).rename(first)


def test_weights_alone_from_any_layout(tmp_path: Path):
    """init.path takes a run of another layout, and what it had to say is not carried on."""
    ranks, parallelism = LAYOUTS["tp2_ep2_sharded"]
    options = {"whole_model": EXPERT_MODEL, "data": {"vocab_size": 99}}
    limits = {"steps": 8, "exit_interval": 2, "eval_interval": None}
    run_distributed(train, ranks, config(tmp_path, name="source", parallelism=parallelism, train=limits, **options))
    source = locate(tmp_path / "source").directory
    expected = {key: value for key, value in tensors(source).items() if not key.startswith("optimizer.")}
    for name, path in (("one", tmp_path / "source"), ("pp2_ep2_sharded", source)):
        ranks, parallelism = LAYOUTS[name]
        run = config(tmp_path, name=f"from_{name}", parallelism=parallelism, init={"path": str(path)}, **options)
        run_distributed(move, ranks, run, tmp_path / name)
        directory = locate(tmp_path / name).directory
        found = tensors(directory)
        different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
        assert not different, (name, different)
        assert not any(value.any() for key, value in found.items() if key.startswith("optimizer."))
        assert torch.load(directory / "common.pt", weights_only=True)["progress"]["step"] == 0
