"""GroupStepAdam against torch's own Adam and AdamW."""

import copy

import pytest
import torch

from bridge.platform.adam import GroupStepAdam


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torch(decoupled: bool, weight_decay: float):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    other = copy.deepcopy(model)
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    ours = GroupStepAdam(model.parameters(), adam_w_mode=decoupled, **settings)
    theirs = (torch.optim.AdamW if decoupled else torch.optim.Adam)(other.parameters(), **settings)
    for step in range(5):
        x = torch.randn(4, 7)
        for network, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            # The last layer's bias has no gradient at the third step: Adam must pass it over.
            (network(x) * (torch.tensor([1.0, 0.0, -2.0]))).pow(2).sum().backward()
            if step == 2:
                network[1].bias.grad = None
            optimizer.step()
    for mine, reference in zip(model[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(mine, reference)
    torch.testing.assert_close(model[1].weight, other[1].weight)


def test_state_has_the_layout_of_fused_adam():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = GroupStepAdam([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert {name: value.dtype for name, value in optimizer.state[parameter].items()} == {
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
    }
