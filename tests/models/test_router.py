"""The choice of experts against megatron-core's own, where that has one, and against transformers' routers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge import platform
from bridge.models.modules.router import choose, chooses_otherwise

TOKENS, EXPERTS = 64, 16
PLAIN: dict[str, Any] = {
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 4,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_group_score_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "norm_topk_prob": None,
    "moe_norm_min": None,
    "moe_input_jitter_eps": None,
}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"moe_router_pre_softmax": True},
        {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_pre_softmax": True, **GROUPS},
        SIGMOID,
        {**SIGMOID, "moe_router_topk": 1},
        {**SIGMOID, **GROUPS, "moe_router_topk_scaling_factor": 2.5},
        {**SIGMOID, **GROUPS, "moe_router_group_score_topk": 2},
    ],
)
def test_equals_megatron_core_where_that_has_it(fields: dict[str, Any]):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = SimpleNamespace(**{**PLAIN, **fields})
    assert not chooses_otherwise(config)
    bias = draw(EXPERTS, seed=1) if config.moe_router_enable_expert_bias else None
    ours, theirs = (draw(TOKENS, EXPERTS).requires_grad_() for _ in range(2))
    probs, chosen = choose(ours, bias, config)
    expected = topk_routing_with_score_function(
        theirs,
        config.moe_router_topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=config.moe_router_score_function,
        expert_bias=bias,
    )
    assert torch.equal(chosen, expected[1])
    torch.testing.assert_close(probs, expected[0])
    for result in (probs, expected[0]):
        (result * draw(TOKENS, EXPERTS, seed=2)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def deepseek_v2() -> tuple[Any, dict[str, Any]]:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf

    config = hf.DeepseekV2Config(
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=3.0,
        hidden_size=EXPERTS,
        num_attention_heads=4,
    )
    fields = {"moe_router_pre_softmax": True, **GROUPS, "moe_router_group_score_topk": 1}
    return hf.DeepseekV2TopkRouter(config), {**fields, "moe_router_topk_scaling_factor": 3.0}


def deepseek_v3(*, normed: bool) -> tuple[Any, dict[str, Any]]:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    config = hf.DeepseekV3Config(
        n_routed_experts=EXPERTS,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=normed,
        hidden_size=EXPERTS,
        num_attention_heads=4,
    )
    router = hf.DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(draw(EXPERTS, seed=1))
    fields = {**SIGMOID, **GROUPS, "moe_router_topk": 3, "moe_router_group_score_topk": 2, "norm_topk_prob": normed}
    return router, {**fields, "moe_router_topk_scaling_factor": 2.5}


def ernie(norm_min: float) -> tuple[Any, dict[str, Any]]:
    from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as hf

    config = hf.Ernie4_5_MoeConfig(moe_num_experts=EXPERTS, moe_k=4, moe_norm_min=norm_min, hidden_size=EXPERTS)
    router = hf.Ernie4_5_MoeTopKRouter(config)
    router.moe_statics.e_score_correction_bias.data.copy_(0.1 * draw(1, EXPERTS, seed=1))
    return router, {"moe_router_enable_expert_bias": True, "moe_norm_min": norm_min}


CASES = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": lambda: deepseek_v3(normed=True),
    "deepseek_v3_unnormed": lambda: deepseek_v3(normed=False),
    "ernie": lambda: ernie(1e-12),
    "ernie_least_sum": lambda: ernie(0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str):
    """With the identity as the router's matrix, hidden states are logits."""
    router, fields = CASES[case]()
    router.weight.data.copy_(torch.eye(EXPERTS))
    config = SimpleNamespace(**{**PLAIN, **fields})
    assert chooses_otherwise(config)
    bias = next((tensor for name, tensor in router.state_dict().items() if "correction_bias" in name), None)
    ours, theirs = (draw(TOKENS, EXPERTS).requires_grad_() for _ in range(2))
    probs, chosen = choose(ours, None if bias is None else bias.flatten(), config)
    _, weights, indices = router(theirs)
    expected = torch.zeros(TOKENS, EXPERTS).scatter(-1, indices, weights)
    assert torch.equal(chosen, torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(-1, indices, True))
    torch.testing.assert_close(probs, expected)
    for result in (probs, expected):
        (result * draw(TOKENS, EXPERTS, seed=2)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_jitter_is_for_training_alone():
    from bridge import parallel
    from bridge.config.routing import route
    from bridge.models import gpt
    from bridge.models.hf import config as hf_config
    from tests import hf_models

    section = hf_config.to_mcore(hf_models.config("mixtral_jitter").to_dict())
    assert section["moe_input_jitter_eps"] == 0.1
    with parallel.single_process():
        (model,) = gpt.build(route({"model": section}), dtype=torch.float32)
        router = model.decoder.layers[0].mlp.router
        hidden = draw(5, 2, 48).to(router.weight.device)
        noise = model.train() and router.apply_input_jitter(hidden) / hidden
        assert 0.89 < noise.min() < 0.95
        assert 1.05 < noise.max() < 1.11
        assert torch.equal(model.eval() and router.apply_input_jitter(hidden), hidden)


def test_a_schedule_can_follow_a_plain_backward_pass(monkeypatch: pytest.MonkeyPatch):
    """megatron-core's own router leaves a scale of shape [], where no schedule can put its own, of shape [1]."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from bridge import parallel
    from bridge.config.routing import route
    from bridge.models import gpt
    from bridge.models.hf import config as hf_config
    from tests import hf_models

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    section = hf_config.to_mcore(hf_models.config("mixtral").to_dict()) | {"moe_aux_loss_coeff": 0.5}
    with parallel.single_process():
        (model,) = gpt.build(route({"model": section}), dtype=torch.float32)
        ids = hf_models.prompts(length=8).to(platform.device())
        positions = torch.arange(8, device=ids.device).expand_as(ids)
        router = model.decoder.layers[0].mlp.router.weight

        def gradient() -> torch.Tensor:
            router.grad = None
            model.train()(ids, positions, None, labels=ids).sum().backward()
            return router.grad.clone()

        at_one = gradient()
        MoEAuxLossAutoScaler.set_loss_scale(torch.zeros(1, device=ids.device))
        assert (at_one - gradient()).norm() > 1e-3 * at_one.norm()  # the scale was 1, not none
