"""Process groups: made again in one process, imagined, and shared by several."""

import os

import pytest
import torch

from bridge import parallel
from tests.distributed import run_distributed


def test_before_and_after():
    assert (parallel.rank(), parallel.size(), parallel.is_main()) == (0, 1, True)
    for _ in range(2):
        with parallel.single_process({"tensor_model_parallel_size": 4}):
            assert parallel.is_initialized()
            assert parallel.size("tp") == 1
    assert not parallel.is_initialized()


def test_single_process_looks_away_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with parallel.single_process():
        assert (parallel.rank(), parallel.size()) == (0, 1)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "8")


def test_a_failing_body_still_tears_down():
    with pytest.raises(KeyError), parallel.single_process():
        raise KeyError("x")
    assert not parallel.is_initialized()


@pytest.mark.parametrize("rank", [0, 5, 15])
def test_imagined_ranks(rank: int):
    fields = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2}
    with parallel.fake(16, rank, fields):
        # megatron-core's order, innermost first: tensor, context, data, pipeline.
        assert parallel.rank("tp") == rank % 2
        assert parallel.size("cp") == 2
        assert parallel.rank("dp") == rank // 4 % 2
        assert parallel.size("dp_cp") == 4
        assert parallel.rank("pp") == rank // 8
        assert parallel.is_pipeline_first_stage() == (rank < 8)
        assert parallel.is_pipeline_last_stage(vp_stage=1, vp_size=2) == (rank >= 8)
        assert not parallel.is_pipeline_last_stage(vp_stage=0, vp_size=2)


def seeds() -> dict[str, float]:
    parallel.initialize({"tensor_model_parallel_size": 2}, seed=11)
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    common = torch.rand(1).item()
    with get_cuda_rng_tracker().fork():
        own = torch.rand(1).item()
    total = torch.tensor([parallel.rank() + 1.0])
    torch.distributed.all_reduce(total, group=parallel.group("tp"))
    parallel.barrier()
    parallel.teardown()
    return {"common": common, "own": own, "sum": total.item()}


def test_seeds_of_tensor_ranks():
    first, second = run_distributed(seeds, 2)
    assert first["common"] == second["common"]
    assert first["own"] != second["own"]
    assert first["sum"] == second["sum"] == 3.0
