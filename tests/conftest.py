"""Environment, markers and fixtures for every test. Set before torch is imported: its thread count is read once."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import durations
from tests.forks import sitecustomize  # watches this process, too

FORKS = tempfile.TemporaryDirectory(prefix="forks_")
ROOT = Path(__file__).resolve().parent.parent

os.environ.update(
    OMP_NUM_THREADS="1",  # two cores, several processes: more threads only wait for each other
    MKL_NUM_THREADS="1",
    NVIDIA_TF32_OVERRIDE="0",  # on a GPU float32 means float32, also inside Transformer Engine
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    # Subprocesses and the fork server of tests/distributed.py find `bridge` and `tests` from any directory.
    PYTHONPATH=os.pathsep.join([sitecustomize.HERE, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
)
os.environ[sitecustomize.NOTES] = FORKS.name
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # pytest under torchrun must not turn into one of its workers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-durations", action="store_true", help="note how long tests take: tests/durations.py")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(durations.Plugin(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu where there is no CUDA device."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    from bridge import platform

    if platform.num_devices() == 0:
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def no_models_left() -> Iterator[None]:
    """Ends the threads of models that are used no more."""
    yield
    if "torch" in sys.modules:
        from tests.pristine import release_models

        release_models()


@pytest.fixture(autouse=True)
def no_fork_of_a_process_with_threads() -> Iterator[None]:
    """Fails the test in which any process of the product forks Python code while it has several threads."""
    yield
    notes = list(Path(FORKS.name).iterdir())
    noted = "\n".join(note.read_text() for note in notes)
    for note in notes:
        note.unlink()
    assert not noted, noted


@pytest.fixture(scope="module")
def warm_processes() -> Iterator[None]:
    """Processes that the module's tests start need not import torch and megatron: see tests/warm."""
    from tests import warm

    warm.on()
    yield
    warm.off()


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """`real_model("minimind2")`: directory of that real pretrained model, fetched into the cache at first use."""
    from tests.real.fetch import fetch

    return fetch


@pytest.fixture
def tiny_hf(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_hf("qwen3")`: directory with that variant of tests/hf_models.py, saved by transformers."""
    from tests.hf_models import save

    def build(variant: str, **options: object) -> Path:
        return save(variant, tmp_path / f"hf_{variant}", **options)

    return build
