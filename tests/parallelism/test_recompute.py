"""What a recompute setting names runs a second time in the backward pass, and nothing else does. That no result changes
is checked by the matrix of layouts."""

from typing import Any

import pytest
import torch

from bridge import parallel
from bridge.config.routing import route
from bridge.errors import ConfigError
from bridge.models import gpt
from tests.parallelism.models import LATENT

MODEL = {**LATENT, "num_layers": 2, "moe_layer_freq": [0, 1], "mtp_num_layers": None, "mtp_loss_scaling_factor": 0.1}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
PARTS = {  # of the layer without experts and the one with
    "attention": "layers.0.self_attention.core_attention",
    "norm": "layers.0.input_layernorm",
    "up": "layers.0.self_attention.linear_kv_up_proj",
    "mlp": "layers.0.mlp.linear_fc1",
    "router": "layers.1.mlp.router",
    "shared": "layers.1.mlp.shared_experts.linear_fc1",
}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


@pytest.mark.parametrize(
    ("settings", "twice"),
    [
        ({}, set()),
        ({**FULL, "recompute_method": "uniform"}, set(PARTS)),
        ({**FULL, "recompute_method": "block"}, {"attention", "norm", "up", "mlp"}),  # the first layer only
        ({"recompute_granularity": "selective"}, {"attention"}),
        (selective("mlp"), {"mlp"}),
        (selective("layernorm"), {"norm"}),
        (selective("mla_up_proj"), {"up"}),
        (selective("moe"), {"router", "shared"}),
        (selective("shared_experts"), {"shared"}),
        (selective("core_attn", "mlp"), {"attention", "mlp"}),
    ],
    ids=lambda value: str(value if isinstance(value, dict) else sorted(value)),  # a set has no order
)
def test_what_runs_twice(settings: dict[str, Any], twice: set[str]):
    with parallel.single_process():
        (model,) = gpt.build(route({"model": MODEL, "parallelism": settings}))
        runs = dict.fromkeys(PARTS, 0)
        for part, path in PARTS.items():
            module = model.decoder.get_submodule(path)
            # Not a hook: recomputation calls some modules' forward by itself.
            module.forward = _counted(module.forward, runs, part)
        ids = torch.arange(16)[None] % 7
        model(ids, torch.arange(16)[None], None, labels=ids).sum().backward()
    assert {part for part, count in runs.items() if count == 2} == twice
    assert all(count in (1, 2) for count in runs.values())


def _counted(forward: Any, runs: dict[str, int], part: str) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        runs[part] += 1
        return forward(*args, **kwargs)

    return counted


def test_units_that_do_not_come_out_even_are_refused():
    settings = {**FULL, "recompute_method": "uniform", "recompute_num_layers": 2}
    routed = route({"model": {**MODEL, "num_layers": 3, "moe_layer_freq": [0, 1, 1]}, "parallelism": settings})
    with parallel.single_process(), pytest.raises(ConfigError, match=r"3 % 2 = 1; set 1 or 3"):
        gpt.build(routed)
