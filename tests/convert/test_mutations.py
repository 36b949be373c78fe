"""mode=verify finds each mistake a converter could make, in every family that can have it: by tensors and by logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.convert import verify as verifying
from bridge.convert.import_ import import_hf
from bridge.weights import locate
from bridge.weights.dist_files import DistWriter, open_dist
from tests import families, hf_models

Tensors = dict[str, torch.Tensor]


def swap_gate_and_up(tensors: Tensors, key: str) -> None:
    tensors[key] = tensors[key].roll(tensors[key].shape[-2] // 2, dims=-2)


def permute_rope_halves(tensors: Tensors, key: str) -> None:
    """Neighbouring channels for halves, in the queries of the first head: the other of the two rotary layouts."""
    first = tensors[key][:4].clone()
    tensors[key][:4] = first[[0, 2, 1, 3]]


def drop(tensors: Tensors, key: str) -> None:
    tensors[key] = torch.zeros_like(tensors[key])


def swap_experts(tensors: Tensors, key: str) -> None:
    tensors[key][[0, 1]] = tensors[key][[1, 0]]


def swap_norms(tensors: Tensors, key: str) -> None:
    other = key.replace("self_attention.linear_qkv", "mlp.linear_fc1")
    if other in tensors:
        tensors[key], tensors[other] = tensors[other], tensors[key]


LAYER = "decoder.layers.3."
# Mistake -> (end of the key it is made on, the mistake).
MISTAKES: dict[str, tuple[str, Callable[[Tensors, str], None]]] = {
    "gate and up swapped": ("mlp.linear_fc1.weight", swap_gate_and_up),
    "gate and up of all experts swapped": ("experts.experts.linear_fc1.weight", swap_gate_and_up),
    "rope halves permuted": ("self_attention.linear_qkv.weight", permute_rope_halves),
    "bias of attention dropped": ("self_attention.linear_qkv.bias", drop),
    "bias of the MLP dropped": ("mlp.linear_fc1.bias", drop),
    "bias of a norm dropped": ("self_attention.linear_qkv.layer_norm_bias", drop),
    "experts swapped": ("experts.experts.linear_fc2.weight", swap_experts),
    "correction bias dropped": ("router.expert_bias", drop),
    "norms swapped": ("self_attention.linear_qkv.layer_norm_weight", swap_norms),
}


def once(ask: Callable[..., Any]) -> Callable[..., Any]:
    """`ask`, whose first answer stands for all."""
    answers: list[Any] = []

    def asked(*arguments: Any) -> Any:
        if not answers:
            answers.append(ask(*arguments))
        return answers[0]

    return asked


@pytest.mark.parametrize("name", families.names())
def test_verify_finds_every_mistake(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What transformers answers is the same for every mistake, and is asked once."""
    variant = next(iter(families.facts(name).VARIANTS))
    source = hf_models.save(variant, tmp_path / "hf", tokenizer=False)
    import_hf(source, tmp_path / "megatron")
    monkeypatch.setattr(verifying, "_transformers_logits", once(verifying._transformers_logits))
    assert verifying.verify(source, tmp_path / "megatron")["passed"]
    folder = locate.locate(tmp_path / "megatron").directory
    dist = open_dist(folder)
    good = {key: dist.read(key).clone() for key in dist.tensors}
    tried = 0
    for mistake, (end, make) in MISTAKES.items():
        bad = {key: tensor.clone() for key, tensor in good.items()}
        for key in [key for key in good if key.startswith(LAYER) and key.endswith(f".{end}")]:
            make(bad, key)
        if all(torch.equal(bad[key], good[key]) for key in good):
            continue
        tried += 1
        with DistWriter(folder) as writer:
            for key, tensor in bad.items():
                writer.write(key, tensor)
        report = verifying.verify(source, tmp_path / "megatron")
        assert not report["passed"], mistake
        assert report["tensors"]["different"], mistake
        assert report["logits"]["max_abs_diff"] > 1e-3, f"{mistake}: {report['logits']}"
    assert tried >= 2, "hardly a mistake of the list can be made here"
