"""Norm of queries and keys over all heads: torch's RMSNorm of the whole, with whole gradients, on any tensor rank."""

from typing import Any

import pytest
import torch

from bridge import parallel
from bridge.config.routing import route
from bridge.errors import ConfigError
from bridge.models import gpt
from bridge.models.modules.full_width_norm import FullWidthNorm
from bridge.weights import shards
from tests.distributed import run_distributed
from tests.models.test_gpt import MODEL

SHAPE = (5, 2, 4, 8)  # sequence, batch, heads, channels
EPS = 1e-2


def tensors() -> list[torch.Tensor]:
    """Input, weight of all heads, and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in (SHAPE, (32,), SHAPE)]


def part_of_the_norm(tp: int) -> dict[str, torch.Tensor]:
    """Output and gradients of this rank's heads."""
    fields = {"tensor_model_parallel_size": tp}
    routed = route({"model": {**MODEL, "qk_layernorm_full_width": True}, "parallelism": fields})
    parallel.initialize(routed.transformer)
    x, weight, gradient = tensors()
    rank, heads = parallel.rank("tp"), SHAPE[2] // tp
    mine = slice(rank * heads, (rank + 1) * heads)
    norm = FullWidthNorm(gpt.transformer_config(routed), 8, EPS, num_heads=4)
    norm.weight.data.copy_(weight.view(4, 8)[mine].reshape(-1))
    local = x[:, :, mine].clone().requires_grad_()
    out = norm(local)
    out.backward(gradient[:, :, mine])
    assert norm.weight.grad is not None
    whole = dict(shards.gather([norm]))["weight"]
    return {"out": out.detach(), "x": local.grad, "weight": norm.weight.grad.view(heads, 8), "saved": whole}


@pytest.mark.parametrize("tp", [1, 2])
def test_equals_the_norm_of_the_whole(tp: int):
    x, weight, gradient = tensors()
    x.requires_grad_()
    weight.requires_grad_()
    out = torch.nn.functional.rms_norm(x.flatten(-2), (32,), weight, EPS).view(SHAPE)
    out.backward(gradient)
    ranks = run_distributed(part_of_the_norm, tp, tp, fresh=True)
    for name, expected in {"out": out, "x": x.grad}.items():
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks], dim=2), expected)
    torch.testing.assert_close(torch.cat([rank["weight"] for rank in ranks]).reshape(-1), weight.grad)
    assert all(torch.equal(rank["saved"], weight) for rank in ranks)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_layernorm": True}, "set only one of the two"),
        ({"normalization": "LayerNorm"}, "needs model.normalization=RMSNorm"),
        ({"num_query_groups": 1}, "1 % 2 = 1"),
    ],
)
def test_refused(fields: dict[str, Any], message: str):
    tp = {"tensor_model_parallel_size": 2 if "num_query_groups" in fields else 1}
    routed = route({"model": {**MODEL, "qk_layernorm_full_width": True, **fields}, "parallelism": tp})
    world = parallel.fake(tp["tensor_model_parallel_size"], 0, routed.transformer)
    with world, pytest.raises(ConfigError, match=message):
        gpt.build(routed, meta=True)
