"""What rows that samples share, or that are padded, cannot be combined with: one line with the way out."""

from pathlib import Path
from typing import Any

import pytest

from bridge.config.layout import rows
from bridge.errors import ConfigError
from tests.training.runs import EXPERTS, MODEL, config

PACKED, FREE, PADDED = {"packing": True}, {"packing": False, "padding_free": True}, {"packing": False}
PP2 = {"pipeline_model_parallel_size": 2}
BALANCED = {**EXPERTS, "moe_router_load_balancing_type": "aux_loss"}
DYNAMIC = {**MODEL, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
LATENT = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "stages": (MODEL, PP2, FREE, r"variable_seq_lengths is false; set it to true, or data\.packing=true"),
    "allgather": ({**BALANCED, "moe_token_dispatcher_type": "allgather"}, {}, FREE, "set it to alltoall"),
    "capacity": ({**BALANCED, "moe_expert_capacity_factor": 1.0}, {}, PADDED, "places of real ones; leave it out"),
    "each_row": ({**EXPERTS, "moe_router_load_balancing_type": "seq_aux_loss"}, {}, PACKED, "set it to aux_loss"),
    "prediction": ({**BALANCED, **LATENT}, {}, PACKED, r"mtp_num_layers: 1 .*; set it to null"),
    "repeated": ({**MODEL, **LATENT}, FULL, PACKED, r"recompute_granularity: full .*set it to selective"),
    "dynamic": (DYNAMIC, {}, PACKED, r"data\.packing: .*dynamic.*set data\.packing=false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path):
    model, parallelism, data, words = REFUSED[name]
    run = config(tmp_path, whole_model=model, parallelism=parallelism)
    with pytest.raises(ConfigError, match=words) as error:
        rows.check(run.routed, data)
    assert "\n" not in str(error.value)


def test_others_are_not(tmp_path: Path):
    for model in (MODEL, BALANCED):
        run = config(tmp_path, whole_model=model, parallelism=PP2)
        for data in (PACKED, PADDED, {}):
            rows.check(run.routed, data)
        assert not rows.row_length_may_vary(run.routed)
        varying = config(tmp_path, whole_model=model, parallelism={**PP2, "variable_seq_lengths": True})
        rows.check(varying.routed, FREE)
        assert rows.row_length_may_vary(varying.routed)
