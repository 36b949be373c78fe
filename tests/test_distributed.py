"""The test harness itself: results by rank, a failing rank, a hanging rank."""

import os
import time

import pytest
import torch

from tests.distributed import run_distributed


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    torch.distributed.init_process_group("gloo")
    value = torch.tensor(float(torch.distributed.get_rank() + offset))
    torch.distributed.all_reduce(value)
    return int(os.environ["LOCAL_RANK"]), value.item()


def _fail_on_rank_one() -> None:
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank one is unwell")
    torch.distributed.barrier()


def _sleep_on_rank_zero() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(60)


def test_results_come_by_rank():
    assert run_distributed(_sum_of_ranks, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_failure_shows_the_traceback():
    with pytest.raises(AssertionError, match="rank one is unwell"):
        run_distributed(_fail_on_rank_one, 2)


def test_hang_is_killed_and_shows_where():
    start = time.monotonic()
    with pytest.raises(AssertionError, match="_sleep_on_rank_zero"):
        run_distributed(_sleep_on_rank_zero, 2, timeout=4.0)
    assert time.monotonic() - start < 30
