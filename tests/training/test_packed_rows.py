"""Loss, gradients, counted tokens and router statistics of packed samples are those of the same samples in rows of
their own, whatever the layout; every layout is one world for all models."""

from pathlib import Path
from typing import Any

import numpy
import pytest

from bridge.data.encode.encoded import Encoded
from bridge.data.samples.store import write
from tests.distributed import run_distributed
from tests.parallelism import models
from tests.parallelism.worlds import option
from tests.training.packed_rows import Seen, compare_all

FOUR_LAYERS = {"num_layers": 4}
FOUR = {**models.MODEL, **FOUR_LAYERS}
AS_A_WHOLE = {"moe_router_load_balancing_type": "aux_loss"}
MODELS: dict[str, dict[str, Any]] = {
    "windowed": models.DENSE,
    "sinks": {**FOUR, "softmax_type": "learnable", "window_size": [6, 0], "window_attn_skip_freq": [0, 1] * 2},
    "learned_positions": {**FOUR, "position_embedding_type": "learned_absolute"},
    "experts": {**models.ALLTOALL, **AS_A_WHOLE},
    "own_choice": {**models.ALLGATHER, **AS_A_WHOLE, "moe_token_dispatcher_type": "alltoall"},
    "latent": {**models.LATENT_ALONE, **FOUR_LAYERS},
    "latent_experts": {
        **{name: value for name, value in models.LATENT.items() if not name.startswith("mtp_")},
        **AS_A_WHOLE,
    },
    "prediction": {**models.LATENT_ALONE, **FOUR_LAYERS, "mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1},
}
WITH_EXPERTS = ("experts", "own_choice", "latent_experts")
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, option("tp2")),
    "pp2": (2, option("pp2")),
    "pp2_vpp2": (2, option("pp2_vpp2")),
    "cp2": (2, option("cp2")),
    "ep2": (2, option("ep2", **FULL)),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples that fill 8 rows nearly, and one of nothing."""
    directory = tmp_path_factory.mktemp("store")
    random = numpy.random.RandomState(0)
    sizes = [25, 25, 21, 17, 13, 13, 12, 12, 9, 9, 8, 8, 5, 5, 5, 5, 4, 4, 0]
    samples = []
    for number, size in enumerate(sizes):
        weights = random.choice([0.0, 0.5, 1.0], size=size).tolist()
        samples.append(Encoded(random.randint(1, 100, size=size).tolist(), weights, "made", number + 1))
    write(directory, samples)
    return directory


@pytest.fixture(scope="module")
def alone(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    (seen,) = run_distributed(compare_all, 1, MODELS, {}, stored, tmp_path_factory.mktemp("alone"))
    return seen


def test_of_one_process(alone: dict[str, Seen]):
    assert {name: seen.wrong for name, seen in alone.items() if seen.wrong} == {}


@pytest.mark.parametrize("name", LAYOUTS)
def test_of_a_layout(name: str, alone: dict[str, Seen], stored: Path, tmp_path: Path):
    ranks, parallelism = LAYOUTS[name]
    some = {model: keys for model, keys in MODELS.items() if name != "ep2" or model in WITH_EXPERTS}
    found = run_distributed(compare_all, ranks, some, parallelism, stored, tmp_path, timeout=400)
    wrong = {(model, rank): seen[model].wrong[:5] for rank, seen in enumerate(found) for model in some}
    assert {where: lines for where, lines in wrong.items() if lines} == {}
    for model in some:
        assert found[0][model].loss == pytest.approx(alone[model].loss, rel=1e-5)
