"""The same for experts, with latent attention, prediction modules and full-width norms; experts have layouts of their
own."""

from pathlib import Path
from typing import Any

import pytest

from tests import hf_models
from tests.distributed import run_distributed
from tests.models.test_layouts import LAYOUTS, assert_same, loss_and_gradients

SEQUENCE_PARALLEL = LAYOUTS["tp2_sp"]
EXPERTS_APART = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
OWN_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": SEQUENCE_PARALLEL,
    "tp2_sp_ep2": {**SEQUENCE_PARALLEL, **EXPERTS_APART},
    "ep2": EXPERTS_APART,
    "tp2_sp_ep2_etp2": {**SEQUENCE_PARALLEL, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "pp2_ep2": {**LAYOUTS["pp2"], **EXPERTS_APART},
    **{name: LAYOUTS[name] for name in ("pp2", "pp2_vpp2", "cp2")},
}
# Between them: one prediction module and two, tied weights, queries with and without a latent, both kinds of routing,
# norms of queries and keys over all heads together, dense
# layers among those with experts, shared experts with a gate and without.
VARIANTS = (
    "deepseek_v3",
    "deepseek_v3_yarn",
    "deepseek_v3_tied",
    "deepseek_v2_lite",
    "olmoe_tied_bias",
    "qwen3_moe",
    "qwen2_moe",
    "mixtral_window",
)
FOUR_RANKS = ("tp2_sp_ep2_etp2", "pp2_ep2")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hf")
    return {name: str(hf_models.save(name, Path(folder, name), tokenizer=False)) for name in VARIANTS}


@pytest.fixture(scope="module")
def alone(directories: dict[str, str]) -> dict[str, Any]:
    (result,) = run_distributed(loss_and_gradients, 1, {}, directories)
    return result


@pytest.mark.parametrize("layout", OWN_LAYOUTS)
def test_divided_model_equals_whole_model(layout: str, directories: dict[str, str], alone: dict[str, Any]):
    ranks = 4 if layout in FOUR_RANKS else 2
    for result in run_distributed(loss_and_gradients, ranks, OWN_LAYOUTS[layout], directories):
        assert_same(result, alone)
