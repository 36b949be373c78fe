"""A model larger than the memory is refused before it is built; out of memory is one line with what helps."""

from pathlib import Path

import pytest

from bridge import estimate
from bridge.errors import ConfigError
from bridge.launch import memory, worker
from bridge.platform import memory as here
from tests.training.runs import config


@pytest.mark.parametrize("share", [0.85, 0.95])
def test_a_model_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    run = config(tmp_path, train={"global_batch_size": 4, "micro_batch_size": 1})
    monkeypatch.setenv("WORLD_SIZE", "2")
    needed = 2 * estimate.memory(run, world_size=2)[0].total
    monkeypatch.setattr(here, "gpu_memory_bytes", lambda: None)
    monkeypatch.setattr(here, "machine_memory_bytes", lambda: int(share * needed))
    if share > memory.MARGIN:
        memory.check(run)
        return
    with pytest.raises(ConfigError, match=r"^model: needs about 0.0 GiB for 2 processes, but this machine has 0.0 GiB"):
        memory.check(run)
    memory.check(config(tmp_path, launch={"check_memory": False}))
    monkeypatch.setattr(here, "gpu_memory_bytes", lambda: int(share * needed / 2))
    with pytest.raises(ConfigError, match="for a process, but its GPU has"):
        memory.check(run)


def test_this_machine_has_some() -> None:
    kib = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert here.machine_memory_bytes() > 0 and kib * 1024 * 0.01 < here.machine_memory_bytes()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_out_of_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import bridge.training.run

    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(bridge.training.run, "run", run)
    asked = config(tmp_path)
    (asked.run_dir / "logs").mkdir(parents=True)
    result = worker.execute(asked, rank=0)
    assert result.status == "failed" and result.traceback is None and result.error is not None
    assert result.error.startswith("out of memory: a process needs about 0.0 GiB (dry_run=true says where it goes)")
    assert "Traceback" in (asked.run_dir / "logs" / "rank_0.log").read_text() and "\n" not in result.error
