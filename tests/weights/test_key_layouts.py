"""Every way to name a tensor leads to the same key, and what no rule knows stays visible."""

import pytest
import torch

from bridge.errors import ConversionError
from bridge.weights.dist_files import DistWriter, open_dist
from bridge.weights.key_layouts import LAYERS, canonical
from bridge.weights.names import entry

RANDOM = torch.Generator().manual_seed(0)
PER_LAYER = {f"{LAYERS}{layer}.mlp.linear_fc1.weight": torch.randn(6, 4, generator=RANDOM) for layer in range(3)}
NORMS = {f"{LAYERS}{layer}.input_layernorm.weight": torch.randn(4, generator=RANDOM) for layer in range(3)}
ALL = {"embedding.word_embeddings.weight": torch.randn(8, 4, generator=RANDOM), **PER_LAYER, **NORMS}


def stored(directory, tensors):
    directory.mkdir(exist_ok=True)
    with DistWriter(directory) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    return open_dist(directory)


def same(dist, tensors):
    return dist.tensors.keys() == tensors.keys() and all(
        dist.spec(key) == (tensor.dtype, tuple(tensor.shape)) and torch.equal(dist.read(key), tensor)
        for key, tensor in tensors.items()
    )


def stacked(tensors, *, by_entry):
    """Layers along a new first axis, written one by one (as pipeline stages do) or as one piece."""
    result = {key: tensor for key, tensor in tensors.items() if not key.startswith(LAYERS)}
    for rest in ("mlp.linear_fc1.weight", "input_layernorm.weight"):
        layers = [tensors[f"{LAYERS}{layer}.{rest}"] for layer in range(3)]
        if by_entry:
            result |= {entry(LAYERS + rest, layer): tensor for layer, tensor in enumerate(layers)}
        else:
            result[LAYERS + rest] = torch.stack(layers)
    return result


@pytest.mark.parametrize("by_entry", [True, False])
def test_stacked_layers(tmp_path, by_entry):
    dist = canonical(stored(tmp_path, stacked(ALL, by_entry=by_entry)))
    assert same(dist, ALL)
    part = dist.read(f"{LAYERS}2.mlp.linear_fc1.weight", (slice(1, 3), slice(0, 4)))
    assert torch.equal(part, PER_LAYER[f"{LAYERS}2.mlp.linear_fc1.weight"][1:3])
    assert same(canonical(dist), ALL)  # once more changes nothing


def test_halves_and_prefix(tmp_path):
    halves = {f"module.{key}": tensor for key, tensor in ALL.items() if key not in PER_LAYER}
    for key, tensor in PER_LAYER.items():
        halves |= {f"module.{key}_w": tensor[:3], f"module.{key}_v": tensor[3:]}
    dist = canonical(stored(tmp_path, halves))
    assert same(dist, ALL)
    key = f"{LAYERS}1.mlp.linear_fc1.weight"
    assert torch.equal(dist.read(key, (slice(2, 5), slice(1, 4))), PER_LAYER[key][2:5, 1:4])


def test_experts(tmp_path):
    place = "mlp.experts.experts"
    experts = {(layer, one): torch.randn(5, 4, generator=RANDOM) for layer in range(2) for one in range(3)}
    wanted = {f"{LAYERS}{layer}.{place}.linear_fc2.weight[{one}]": t for (layer, one), t in experts.items()}
    single = {f"{LAYERS}{layer}.{place}.{one}.linear_fc2.weight": t for (layer, one), t in experts.items()}
    assert same(canonical(stored(tmp_path / "single", single)), wanted)
    whole = torch.stack([torch.stack([experts[layer, one] for one in range(3)]) for layer in range(2)])
    dist = canonical(stored(tmp_path / "stacked", {f"{LAYERS}{place}.linear_fc2.weight": whole}))
    assert all(torch.equal(dist.read(key), tensor) for key, tensor in wanted.items())


def test_norms_go_where_the_model_has_them(tmp_path):
    dist = stored(tmp_path, ALL)
    places = (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    fused = {key.replace(*places): tensor for key, tensor in ALL.items()}
    renamed = canonical(dist, wanted=fused)
    assert same(renamed, fused)
    assert same(canonical(renamed, wanted=ALL), ALL)
    assert same(canonical(dist, wanted=[*ALL, *fused]), ALL)  # a model with both keeps what is there


def test_what_no_rule_knows_stays(tmp_path):
    tensors = ALL | {
        "adapter.weight": torch.ones(2),
        f"{LAYERS}0.mlp.linear_fc2.weight_w": torch.ones(2),
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.ones(3, 2),
    }
    assert same(canonical(stored(tmp_path, tensors)), tensors)


def test_two_models_are_refused(tmp_path):
    dist = stored(tmp_path, {f"{prefix}{key}": t for prefix in ("a.", "b.") for key, t in ALL.items()})
    with pytest.raises(ConversionError, match="holds layers below 'a.', 'b.'; save one model per checkpoint"):
        canonical(dist)
