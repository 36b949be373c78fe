"""Random weights: the same in every layout, and distributed as megatron-core's own."""

import contextlib
import random
from typing import Any

import numpy
import pytest
import torch

from bridge import parallel
from bridge.config.routing import route
from bridge.models import gpt, initialise
from bridge.models.hf import config as hf_config
from bridge.platform.random_state import random_state
from bridge.weights import shards
from tests import hf_models
from tests.parallelism.models import ALLTOALL, DENSE, LATENT


def _of(variant: str, **more: Any) -> dict[str, Any]:
    return {**hf_config.to_mcore(hf_models.config(variant).to_dict()), **more}


# Between them: tied embeddings drawn by a function of their own, padded vocabularies (of 100 and 131), gated and plain
# layers, fewer key groups than ranks, biases, learned positions, shared experts and others, with biases and sinks,
# latent attention, prediction modules, layers of unequal size.
SECTIONS: dict[str, dict[str, Any]] = {
    "dense": {**DENSE, "num_query_groups": 1, "embedding_init_method_std": 0.5, "make_vocab_size_divisible_by": 32},
    "experts": {**ALLTOALL, "moe_shared_expert_gate": True},
    "latent": LATENT,
    "gpt2": _of("gpt2_no_dropout"),
    "gpt_oss": _of("gpt_oss"),
    "tied_predictions": _of("glm4_moe_tied"),
    "unequal": _of("llama_nemotron_empty"),
}
PP2, EP2 = {"pipeline_model_parallel_size": 2}, {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CHUNKS = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "tp4": ({**TP2, "tensor_model_parallel_size": 4}, 4),
    "tp2_pp2": ({**TP2, **PP2}, 4),
    "ep2": (EP2, 2),
    "tp2_ep2": ({**TP2, **EP2, "expert_tensor_parallel_size": 1}, 2),
    "ep2_etp2": ({**TP2, **EP2, "expert_tensor_parallel_size": 2}, 4),
    "pp2_vpp2": ({**PP2, **CHUNKS}, 2),
    "ep2_drawn_on_cpu": ({**EP2, "use_cpu_initialization": True}, 2),
}
OF_SECTION = {
    "dense": ("tp4", "tp2_pp2", "pp2_vpp2"),
    "experts": ("tp2_pp2", "ep2", "tp2_ep2", "ep2_etp2", "ep2_drawn_on_cpu"),
    "latent": ("tp2_pp2", "ep2_etp2"),
    "gpt2": ("tp2_pp2",),
    "gpt_oss": ("tp2_ep2",),
    "tied_predictions": ("tp2_pp2",),
    "unequal": ("tp2_pp2",),
}


def routed(section: dict[str, Any], **parallelism: Any) -> Any:
    return route({"model": section, "parallelism": {"pipeline_dtype": "fp32", **parallelism}})


def whole_model(section: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the model on one process, without the padding of the vocabulary."""
    with parallel.single_process():
        model = gpt.build(routed(section), dtype=torch.float32, **options)
        state = {key: whole.clone() for key, whole in shards.gather(model)}
    return without_padding(state, section["vocab_size"])


def without_padding(state: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {key: whole[:vocab_size] if key in ends else whole for key, whole in state.items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few rows each, so that slices begin and end in the middle of them."""
    monkeypatch.setattr(initialise, "BLOCK", 300)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_layout_starts_from_the_weights_of_one_process(name: str):
    """Rank by rank, in worlds that do not exist: what each holds is its part of the whole tensor, to the bit."""
    section = SECTIONS[name]
    whole = whole_model(section, seed=5)
    drawn = {key: tensor for key, tensor in whole.items() if tensor.unique().numel() > 1}
    for layout in OF_SECTION[name]:
        parallelism, ranks = LAYOUTS[layout]
        layout_routed, seen = routed(section, **parallelism), set()
        for rank in range(ranks):
            with parallel.fake(ranks, rank, layout_routed.transformer):
                for key, held in shards.pieces(gpt.build(layout_routed, dtype=torch.float32, seed=5)).items():
                    for piece in held.pieces:
                        expected = whole[key][piece.place]
                        rows = len(expected)
                        assert torch.equal(piece.data[:rows], expected), f"{layout}, rank {rank}: {key}"
                        assert not piece.data[rows:].any(), f"{layout}, rank {rank}: padding of {key}"
                        seen.add(key)
        assert seen == whole.keys()
    starts = [tuple(tensor.flatten()[:4].tolist()) for tensor in drawn.values()]
    assert len(set(starts)) == len(starts), "two layers or experts begin with the same numbers"


@pytest.fixture
def megatrons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialise, "noted", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(initialise, "draw", lambda chunks, seed: None)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "unequal"])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_distribution_is_megatron_cores(name: str, on_cpu: bool, request: pytest.FixtureRequest):
    """Mean and standard deviation of each tensor lie within 5 standard errors; what is constant there is the same."""
    section = {**SECTIONS[name], "use_cpu_initialization": on_cpu}
    ours = whole_model(section, seed=1)
    request.getfixturevalue("megatrons_own")
    theirs = whole_model(section)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        number, std = expected.numel(), expected.std()
        if number == 1 or expected.unique().numel() == 1:
            assert torch.equal(ours[key], expected), key
            continue
        assert not torch.equal(ours[key], expected), f"{key} is not drawn by us"
        assert abs(ours[key].mean() - expected.mean()) < 5 * std * (2 / number) ** 0.5, key
        assert abs(ours[key].std() / std - 1) < 5 / number**0.5, key


def test_dtype_rounds_the_same_numbers():
    full = whole_model(SECTIONS["dense"])
    with parallel.single_process():
        (model,) = gpt.build(routed(SECTIONS["dense"]), dtype=torch.bfloat16)
        half = without_padding({key: whole.clone() for key, whole in shards.gather([model])}, 100)
    for key, tensor in full.items():
        assert torch.equal(half[key], tensor.bfloat16()), key


def test_random_generators_stand_where_they_stood():
    """Whatever this rank's part of the model is, dropout begins with the same numbers."""
    section = {**SECTIONS["gpt2"], "embedding_init_method_std": 0.3}  # learned positions: torch draws them at once
    with parallel.single_process():
        before = random_state()
        expected = random.random(), numpy.random.rand(), torch.rand(1).item()
        for seed in (3, None):
            random.setstate(before["python"])
            numpy.random.set_state(before["numpy"])
            torch.set_rng_state(before["torch"])
            (model,) = gpt.build(routed(section), seed=seed)
            assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == expected
            tracker = random_state()["tracker"]
            assert all(torch.equal(tracker[name], state) for name, state in before["tracker"].items())
        # A program that adds a module of its own gets random weights for it.
        assert model.config.init_method(torch.zeros(8, 8)).std() > 0


def test_without_initialisation_nothing_is_drawn():
    with parallel.single_process():
        (model,) = gpt.build(routed({**SECTIONS["experts"], "perform_initialization": False}), seed=None)
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
        initialise.draw([model], seed=1)
        assert all((parameter == 7.0).all() for parameter in model.parameters())


class Quantised(torch.nn.Parameter):
    """Stands in for a quantised parameter of Transformer Engine: parts of it cannot be written, the whole can.

    It holds tenths, and keeps what was written before rounding for the optimizer.
    """

    def copy_(self, values: torch.Tensor) -> "Quantised":  # type: ignore[override]
        self.data = (values * 10).round() / 10
        return self

    def get_high_precision_init_val(self) -> torch.Tensor:
        return self.before

    def detach(self) -> torch.Tensor:
        raise AssertionError("a part of it would be written")


def test_quantised_parameters_are_written_whole():
    with parallel.single_process():
        (plain,) = gpt.build(routed(DENSE), seed=1)
        (model,) = gpt.build(routed(DENSE), seed=None)
        mlp = model.decoder.layers[0].mlp.linear_fc1
        weight = Quantised(mlp.weight.data)
        weight.before = torch.zeros_like(weight.data)
        mlp.param_init_meta = {"weight": type("Meta", (), {"init_fn": model.config.init_method})}
        mlp.weight = weight
        initialise.draw([model], seed=1)
        expected = plain.decoder.layers[0].mlp.linear_fc1.weight.data
        assert torch.equal(weight.before, expected)
        assert torch.equal(weight.data, (expected * 10).round() / 10)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SECTIONS)
def test_transformer_engine_starts_from_the_same_weights(name: str):
    states = [whole_model({**SECTIONS[name], "transformer_impl": kind}) for kind in ("local", "transformer_engine")]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(states[1][key], tensor), key


@pytest.mark.gpu
def test_fp8_parameters_start_from_the_same_weights():
    """And the optimizer's copies from the numbers before they were rounded."""
    precision = {"bf16": True, "params_dtype": "bf16", "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_param": True}
    with parallel.single_process():
        (plain,) = gpt.build(routed(DENSE), dtype=torch.bfloat16)
        (model,) = gpt.build(route({"model": DENSE, "precision": precision}))
        quantised = 0
        for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            if not hasattr(parameter, "get_high_precision_init_val"):
                assert torch.equal(parameter, expected), name
                continue
            quantised += 1
            assert torch.equal(parameter.get_high_precision_init_val(), expected.cpu()), name
            torch.testing.assert_close(parameter.dequantize(), expected.data, atol=2e-2, rtol=0.07)
        assert quantised
