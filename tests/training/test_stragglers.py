"""The report that names the slowest rank."""

import os
import re
import time
from pathlib import Path
from typing import Any

from bridge.training.stragglers import Times, line
from tests.distributed import run_distributed
from tests.training.runs import Ran, config, train_and_print

SECONDS = 0.1  # per sample; two samples a step on each rank


def train_with_a_slow_disk(run: Any) -> tuple[Ran, str]:
    from bridge.data import mock

    original = mock.RandomTokens.__getitem__

    def slow(self: Any, index: int) -> Any:
        time.sleep(SECONDS if os.environ["RANK"] == "1" else 0)
        return original(self, index)

    mock.RandomTokens.__getitem__ = slow  # type: ignore[method-assign]
    return train_and_print(run)


def test_a_rank_whose_data_comes_slowly_is_named(tmp_path: Path) -> None:
    run = config(tmp_path, train={"steps": 4, "eval_interval": None}, log={"straggler_interval": 2})
    _, printed = run_distributed(train_with_a_slow_disk, 2, run)[0]
    host = re.escape(os.uname().nodename)
    found = re.findall(
        rf"^step (\d): slowest is rank 1 \({host}\), (\S+) s per step until its gradients are ready, "
        rf"(\S+) times the median; rank 1 \({host}\) reads longest, (\S+) s per step$",
        printed,
        flags=re.MULTILINE,
    )
    assert [step for step, *_ in found] == ["2", "4"]
    for _, own, ratio, reading in found:
        assert float(own) >= float(reading) >= 2 * SECONDS * 0.99 and float(ratio) > 1


def test_the_slowest_and_the_longest_reader_may_differ() -> None:
    ranks = [Times("a", 0.3, 0.1), Times("a", 0.2, 0.0), Times("b", 0.8, 0.01), Times("b", 0.2, 0.15)]
    assert line(9, ranks) == (
        "step 9: slowest is rank 2 (b), 0.8 s per step until its gradients are ready, 3.20 times the median; "
        "rank 3 (b) reads longest, 0.15 s per step"
    )
