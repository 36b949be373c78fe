"""The test harness itself: results by rank, a failing rank, a hanging rank, and what a case leaves for the next."""

import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

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


def _pid() -> int:
    return os.getpid()


def _leave_a_thread() -> int:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return os.getpid()


def test_a_world_stays_until_a_case_fails_or_leaves_a_thread():
    first = run_distributed(_pid, 2)
    assert run_distributed(_pid, 2) == first and not {*run_distributed(_pid, 2, fresh=True)} & {*first}
    with pytest.raises(AssertionError, match="rank one is unwell"):
        run_distributed(_fail_on_rank_one, 2)
    second = run_distributed(_leave_a_thread, 2)
    assert not {*second} & {*first} and not {*run_distributed(_pid, 2)} & {*second}


def _state() -> list[Any]:
    """Of all that `_disturb` changes."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.num_microbatches_calculator import _GLOBAL_NUM_MICROBATCHES_CALCULATOR as calculator
    from megatron.core.rerun_state_machine import _GLOBAL_RERUN_STATE_MACHINE as machine
    from megatron.core.transformer.moe import moe_utils

    from bridge.checkpoint import files

    parts = [calculator, machine, dict(moe_utils._MOE_LAYER_WISE_LOGGING_TRACKER)]
    parts += [getattr(parallel_state, name) for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_GLOBAL_MEMORY_BUFFER")]
    parts += [torch.distributed.is_initialized(), torch.get_default_dtype(), torch.get_num_threads()]
    parts += [torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), random.random(), torch.rand(1)]
    parts += [os.getcwd(), sys.argv, [*sys.path], os.environ.get("CHANGED"), len(warnings.filters)]
    parts += [logging.root.level, str(signal.getsignal(signal.SIGTERM)), signal.pthread_sigmask(signal.SIG_BLOCK, ())]
    parts += [files.publish.__module__, shutil.rmtree.__module__, Path.replace.__module__, hasattr(files, "added")]
    return [str(part) for part in [*parts, FileSystemWriterAsync.finish.__module__]]


def _disturb() -> list[Any]:
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.transformer.moe import moe_utils

    from bridge import parallel
    from bridge.checkpoint import files

    parallel.initialize({"tensor_model_parallel_size": 2})
    parallel_state.get_global_memory_buffer().get_tensor((2,), torch.float32, "name")
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 4, 1, 1)
    rerun_state_machine.initialize_rerun_state_machine()
    moe_utils._MOE_LAYER_WISE_LOGGING_TRACKER["loss"] = {}
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    os.environ["CHANGED"] = "1"
    os.chdir("/")
    sys.argv, sys.path[:0] = ["other"], ["/other"]
    warnings.simplefilter("ignore")
    logging.root.setLevel(logging.DEBUG)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    files.publish = shutil.rmtree = Path.replace = FileSystemWriterAsync.finish = _pid  # type: ignore[assignment]
    files.added = 1  # type: ignore[attr-defined]
    return _state()


def test_what_a_case_changes_is_put_back():
    before = run_distributed(_state, 2)
    disturbed = run_distributed(_disturb, 2)
    assert run_distributed(_state, 2) == before
    assert len(before[0]) == 25
    assert [one for one, other in zip(before[0], disturbed[0], strict=True) if one == other] == []


def _replace_in_what_it_imports() -> bool:
    there = "bridge.data.mock" in sys.modules
    from bridge.data import mock

    mock.RandomTokens = _pid  # type: ignore[assignment, misc]
    return there


def _home_of_what_was_replaced() -> str:
    from bridge.data import mock

    return mock.RandomTokens.__module__


def test_what_a_case_changes_in_a_module_that_it_imports_first_is_put_back():
    assert run_distributed(_replace_in_what_it_imports, 3) == [False] * 3, "a new world"
    assert run_distributed(_home_of_what_was_replaced, 3) == ["bridge.data.mock"] * 3
