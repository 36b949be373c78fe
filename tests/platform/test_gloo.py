"""Uneven pieces over gloo; groups of one rank."""

import torch

from tests.distributed import run_distributed

SIZES = [3, 1]


def uneven() -> tuple[torch.Tensor, torch.Tensor]:
    from megatron.core.tensor_parallel import mappings

    from bridge import parallel

    parallel.initialize({"tensor_model_parallel_size": 2})
    rank, group = parallel.rank(), parallel.group("tp")
    own = torch.arange(SIZES[rank] * 2.0).view(SIZES[rank], 2) + 100 * rank
    gathered = mappings._gather_along_first_dim(own, group, SIZES)
    scattered = mappings._reduce_scatter_along_first_dim(torch.arange(8.0).view(4, 2) * (rank + 1), group, SIZES)
    parallel.teardown()
    return gathered, scattered


def test_uneven_gather_and_reduce_scatter():
    results = run_distributed(uneven, 2)
    whole = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(2.0).view(1, 2) + 100])
    total = 3 * torch.arange(8.0).view(4, 2)
    for (gathered, scattered), piece in zip(results, total.split(SIZES), strict=True):
        assert torch.equal(gathered, whole)
        assert torch.equal(scattered, piece)


def groups() -> dict[str, int]:
    """Axis -> which of this rank's groups it has, numbered as they are met."""
    from bridge import parallel

    parallel.initialize({"tensor_model_parallel_size": 2})
    met: list[object] = []
    numbers = {}
    for axis in ("tp", "pp", "cp", "dp", "ep", "world"):
        group = parallel.group(axis)
        assert parallel.size(axis) == torch.distributed.get_world_size(group)
        met += [] if any(group is other for other in met) else [group]
        numbers[axis] = next(number for number, other in enumerate(met) if other is group)
    total = torch.ones(1)
    for group in met:
        torch.distributed.all_reduce(total, group=group)
    assert total == 2.0 ** sum(torch.distributed.get_world_size(group) == 2 for group in met)
    parallel.teardown()
    return numbers


def test_a_rank_alone_has_one_group_for_all_axes():
    for numbers in run_distributed(groups, 2):
        assert len({numbers[axis] for axis in ("pp", "cp", "dp", "ep")}) == 1
        assert len({numbers[axis] for axis in ("tp", "pp", "world")}) == 3
