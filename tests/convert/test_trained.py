"""What training writes at any layout, weights among optimizer state in several ranks' files, exports bit by bit."""

import pytest
import torch
from safetensors.torch import load_file

from bridge.convert.export import export_hf
from bridge.models.hf import config as hf_config
from bridge.weights import locate
from bridge.weights.dist_files import open_dist
from tests.distributed import run_distributed
from tests.training import runs

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2_sharded": {"use_distributed_optimizer": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_with_no_learning_rate_gives_the_source_back(tiny_hf, tmp_path, layout):
    """Hugging Face -> init.path -> two ranks' step and checkpoint -> Hugging Face."""
    source = tiny_hf("llama_tied")
    run = runs.config(
        tmp_path,
        whole_model=hf_config.to_mcore(hf_config.read(source)),
        parallelism=LAYOUTS[layout],
        optimizer={"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0},
        train={"steps": 1, "eval_interval": None},
        scheduler={"lr_warmup_steps": 0},
        init={"path": str(source)},
    )
    run_distributed(runs.train, 2, run, fresh=True)
    directory = locate.locate(run.run_dir).directory
    assert len(list(directory.glob("*.distcp"))) >= 2
    assert any(key.startswith("optimizer.") for key in open_dist(directory).tensors)
    export_hf(run.run_dir, tmp_path / "back")
    theirs, ours = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (tmp_path / "back" / "generation_config.json").exists()
