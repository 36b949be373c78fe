"""An output appears whole or not at all."""

import os
import signal

import pytest

from bridge.errors import ConversionError
from bridge.weights.output import new_directory
from bridge.weights.pointer import LATEST


def make(path, *, overwrite=False, then=lambda: None):
    with new_directory(path, overwrite=overwrite, key="hf") as directory:
        assert directory.parent == path.parent
        (directory / "config.json").write_text("new")
        then()


def interrupt():
    raise KeyboardInterrupt


def test_appears_with_its_parents(tmp_path):
    make(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b" / "config.json").read_text() == "new"


@pytest.mark.parametrize(
    ("then", "raised"),
    [
        (lambda: 1 / 0, ZeroDivisionError),
        (interrupt, KeyboardInterrupt),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit),
    ],
)
def test_interruption_leaves_nothing_and_the_old_output(tmp_path, then, raised):
    with pytest.raises(raised):
        make(tmp_path / "out", then=then)
    assert os.listdir(tmp_path) == []
    make(tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    with pytest.raises(raised):
        make(tmp_path / "out", overwrite=True, then=then)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "old").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_existing_output_needs_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")  # an empty directory is free
    (tmp_path / "out" / "old").touch()
    with pytest.raises(ConversionError, match=r"^hf: .*/out exists; choose another path or set overwrite=true$"):
        make(tmp_path / "out")
    make(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path / "out") == ["config.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_only_model_directories_are_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(ConversionError, match="is not a model directory, so overwrite=true does not replace it"):
        make(tmp_path / "home", overwrite=True)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / LATEST).touch()
    with pytest.raises(ConversionError, match="is not a model directory"):
        make(run, overwrite=True)  # metrics and configuration of a run are not ours
    make(run / "checkpoints", overwrite=True)


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead, alive = tmp_path / ".out.partial-999999999", tmp_path / f".out.partial-{os.getppid()}"
    for directory in (dead, alive):
        directory.mkdir()
    make(tmp_path / "out")
    assert not dead.exists()
    assert alive.exists()
