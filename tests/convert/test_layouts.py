"""Live models of every family, divided in every way: weights go in and come out bit by bit, from layout to layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import bridge
from bridge import parallel
from bridge.errors import ConfigError
from bridge.models.hf import config as hf_config
from bridge.weights import locate, pointer
from tests import families, hf_models, plain_megatron
from tests.distributed import run_distributed

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}
EP2 = {"expert_model_parallel_size": 2}
# Layout -> (ranks, fields, the layout that then reads what this one saved).
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one": (1, {}, "pp2"),
    "tp2": (2, TP2, "one"),
    "pp2": (2, PP2, "tp2"),
    "pp2_vpp2": (2, PP2 | VPP2, "tp2"),
    "tp2_pp2": (4, TP2 | PP2, "pp2_vpp2"),
    "ep2": (2, EP2, "tp2_ep2_etp1"),
    "tp2_ep2_etp1": (2, TP2 | EP2 | {"expert_tensor_parallel_size": 1}, "tp2_ep2_etp2"),
    "tp2_ep2_etp2": (4, TP2 | EP2 | {"expert_tensor_parallel_size": 2}, "ep2"),
}

# megatron-core has no biases of experts divided over tensor ranks, and wrong gradients of undivided ones without EP.
REFUSED = {"gpt_oss": {"tp2", "tp2_pp2", "tp2_ep2_etp2"}}


def export(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in bridge.export_weights(model)}


def load_and_save(directories: dict[str, Path], layout: str, target: Path) -> dict[str, list[str]]:
    """For each model the tensors that an export of it, loaded from its directory, gets wrong. Saves it in `target`."""
    wrong = {}
    for name, directory in directories.items():
        if layout in REFUSED.get(name, ()):
            with pytest.raises(ConfigError):
                bridge.load_model(directory, parallelism=LAYOUTS[layout][1])
            continue
        model = bridge.load_model(directory, parallelism=LAYOUTS[layout][1])
        wrong[name] = differences(export(model), directory)
        root = target / name
        folder = pointer.iteration_directory(root, iteration=7)
        if parallel.is_main():
            folder.mkdir(parents=True)
            (root / pointer.LATEST).write_text("7")
            (root / locate.MODEL_YAML).write_text(yaml.safe_dump(hf_config.to_mcore(hf_config.read(directory))))
        parallel.barrier()
        state = {}
        for number, chunk in enumerate(model):
            state[f"model{number}"] = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        plain_megatron.save_checkpoint(state, folder)
    return wrong


def load_saved(directories: dict[str, Path], layout: str, target: Path) -> dict[str, list[str]]:
    """For each model the tensors that an export of it gets wrong after loading what `load_and_save` saved."""
    fields = LAYOUTS[layout][1]
    return {
        name: differences(export(bridge.load_model(target / name, parallelism=fields)), directory)
        for name, directory in directories.items()
        if (target / name).is_dir() and layout not in REFUSED.get(name, ())
    }


def differences(exported: dict[str, torch.Tensor], directory: Path) -> list[str]:
    stored = load_file(directory / "model.safetensors")
    return [
        *sorted(exported.keys() ^ stored.keys()),
        *(name for name in exported.keys() & stored.keys() if exported[name].dtype != stored[name].dtype),
        *(name for name in exported.keys() & stored.keys() if not torch.equal(exported[name], stored[name])),
    ]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The plain model of every family."""
    folder = tmp_path_factory.mktemp("hf")
    variants = [next(iter(families.facts(name).VARIANTS)) for name in families.names()]
    return {name: hf_models.save(name, folder / name, tokenizer=False) for name in variants}


def has_experts(directory: Path) -> bool:
    return bool(hf_config.to_mcore(hf_config.read(directory)).get("num_moe_experts"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_at_every_layout(layout: str, directories: dict[str, Path], tmp_path: Path):
    ranks, fields, other = LAYOUTS[layout]
    chosen = {
        name: path
        for name, path in directories.items()
        if "expert_model_parallel_size" not in fields or has_experts(path)
    }
    for wrong in run_distributed(load_and_save, ranks, chosen, layout, tmp_path, fresh=True):
        assert not any(wrong.values()), wrong
    for wrong in run_distributed(load_saved, LAYOUTS[other][0], chosen, other, tmp_path):
        assert not any(wrong.values()), (other, wrong)
