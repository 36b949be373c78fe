"""Runs, checkpoint roots and iterations are found; anything else is an error that says what it is."""

import subprocess
import sys

import pytest

from bridge.errors import ConfigError
from bridge.weights import locate, pointer


@pytest.fixture
def run_dir(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for iteration in (50, 100):
        directory = pointer.iteration_directory(root, iteration=iteration)
        directory.mkdir(parents=True)
        (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        (directory / ".metadata").touch()
    (root / pointer.LATEST).write_text("100\n")
    return tmp_path / "run"


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/iter_0000100"])
def test_finds_the_latest_from_run_root_and_iteration(run_dir, inside):
    found = locate.locate(run_dir / inside)
    assert found == (run_dir / "checkpoints", 100, run_dir / "checkpoints" / "iter_0000100")
    assert locate.is_megatron(run_dir / inside)


def test_an_iteration_directory_need_not_be_the_latest(run_dir):
    assert locate.locate(run_dir / "checkpoints" / "iter_0000050").iteration == 50


def test_unfinished_iteration(run_dir):
    unfinished = run_dir / "checkpoints" / "iter_0000100"
    (unfinished / "metadata.json").write_text("{")
    with pytest.raises(ConfigError, match="^megatron: .*iter_0000100 is not a complete torch_dist checkpoint"):
        locate.locate(run_dir)
    (unfinished / "metadata.json").unlink()
    with pytest.raises(ConfigError, match="^megatron: .*iter_0000100 has .metadata but no metadata.json: its save was"):
        locate.locate(run_dir)
    (unfinished / ".metadata").unlink()
    with pytest.raises(ConfigError, match="^megatron: .*iter_0000100 is not a complete torch_dist checkpoint"):
        locate.locate(run_dir)


def test_damaged_tracker(run_dir):
    (run_dir / "checkpoints" / pointer.LATEST).write_text("new")
    with pytest.raises(ConfigError, match="holds 'new', not an iteration number"):
        locate.locate(run_dir)


def test_release_of_megatron_lm(run_dir):
    root = run_dir / "checkpoints"
    (root / "iter_0000100").rename(root / "release")
    (root / pointer.LATEST).write_text("release")
    for path in (run_dir, root / "release"):
        assert locate.locate(path) == (root, 0, root / "release")


def test_a_torch_dist_folder_by_any_name(run_dir):
    folder = (run_dir / "checkpoints" / "iter_0000100").rename(run_dir / "weights")
    assert locate.is_megatron(folder)
    assert locate.locate(folder) == (folder, 0, folder)


def test_other_formats_are_refused_by_name(run_dir):
    folder = run_dir / "checkpoints" / "iter_0000100"
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ConfigError, match="old format 'zarr'; load it with .* --ckpt-convert-format torch_dist"):
        locate.locate(run_dir)
    (folder / "mp_rank_00_000").mkdir()
    (folder / "mp_rank_00_000" / "model_optim_rng.pt").touch()
    with pytest.raises(ConfigError, match="^megatron: .*00100 is in Megatron-LM's old format 'torch'; load it with"):
        locate.locate(run_dir)
    with pytest.raises(ConfigError, match="^megatron: .*old is in Megatron-LM's old format 'torch'; load it with"):
        locate.locate(folder.rename(run_dir / "old"))


def test_other_directories(tmp_path):
    with pytest.raises(ConfigError, match="^init.path: .*nowhere is not a directory"):
        locate.locate(tmp_path / "nowhere", key="init.path")
    with pytest.raises(ConfigError, match="neither a run nor a Megatron checkpoint"):
        locate.locate(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match="is a Hugging Face directory"):
        locate.locate(tmp_path)
    assert locate.is_hf(tmp_path)


def test_model_section_round_trip_and_errors(tmp_path):
    section = {
        "family": "llama",
        "layernorm_epsilon": 1e-5,
        "window_size": [511, 0],
        "rope_parameters": {"factor": 8.0},
    }
    with pytest.raises(ConfigError, match="model.yaml is missing"):
        locate.read_model_section(tmp_path)
    locate.write_model_section(tmp_path, section)
    assert locate.read_model_section(tmp_path) == section
    (tmp_path / "model.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        locate.read_model_section(tmp_path)
    (tmp_path / "model.yaml").write_text("5")
    with pytest.raises(ConfigError, match="holds no mapping"):
        locate.read_model_section(tmp_path)


def test_costs_no_torch():
    code = "import sys, bridge.weights.locate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
