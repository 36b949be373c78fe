"""next_token that also computes, from the hidden states that reach the routers, what a model says of its experts.

The formulas are those of the papers: f_i is the share of the chosen experts that are number i, P_i the mean score of
expert i; a balancing loss is E sum_i f_i P_i (2101.03961, equation 4), the z-loss the mean square of log sum exp of the
logits (2202.08906, equation 5). For one process.
"""

from dataclasses import dataclass, field
from typing import Any

from bridge.objectives.next_token import NextToken
from bridge.objectives.objective import Loss

BALANCING = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss")
OF_TOKENS = ("tokens_per_expert_min", "tokens_per_expert_mean", "tokens_per_expert_max")


@dataclass(frozen=True)
class ByHand(NextToken):
    """Each name with by_hand_ before it."""

    name: str = "tests.training.experts_by_hand"
    micro_batches: int = 1  # of a step
    inputs: list[Any] = field(default_factory=list)  # of this micro-batch: (router, hidden states [S, B, hidden])
    chosen: list[Any] = field(default_factory=list)  # of this step's micro-batches: {router: tokens of each expert}
    numbers = tuple(f"by_hand_{name}" for name in (*BALANCING, "z_loss", *OF_TOKENS))

    def lengths(self, batch: Any) -> Any:
        """What counts in tests.training.masked."""
        return (batch["loss_mask"] > 0).sum(dim=1)

    def forward(self, model: Any, batch: Any) -> Any:
        from megatron.core.utils import unwrap_model

        hooks = [
            module.register_forward_pre_hook(lambda router, inputs: self.inputs.append((router, inputs[0].detach())))
            for name, module in unwrap_model(model).named_modules()
            if name.endswith(".router")
        ]
        output = super().forward(model, batch)
        for hook in hooks:
            hook.remove()
        return output

    def loss(self, output: Any, batch: Any) -> Loss:
        import torch

        good = super().loss(output, batch)
        watched = [self.inputs.pop(0) for _ in range(len(self.inputs))]
        if not torch.is_grad_enabled():
            return good
        one = torch.tensor(1.0)
        chosen, numbers = {}, {}
        for router, hidden in watched:
            experts, topk = router.weight.shape[0], router.topk
            logits = (hidden @ router.weight.detach().T).float()
            scores = logits.sigmoid()
            ranked = scores + router.expert_bias
            chosen[router] = torch.bincount(ranked.topk(topk).indices.flatten(), minlength=experts).double()
            share = scores / scores.sum(dim=-1, keepdim=True)
            favoured = torch.nn.functional.one_hot(scores.topk(topk).indices, experts).sum(dim=2).double() / topk
            by_batch = experts * (favoured.mean(dim=(0, 1)) * share.mean(dim=(0, 1))).sum()
            by_sequence = experts * (favoured.mean(dim=0) * share.mean(dim=0)).sum(dim=-1).mean()
            so_far = [favoured.mean(dim=(0, 1)), *(kept[router, "favoured"] for kept in self.chosen)]
            chosen[router, "favoured"] = so_far[0]
            by_step = experts * (torch.stack(so_far).mean(dim=0) * share.mean(dim=(0, 1))).sum()
            for name, value in zip(
                (*BALANCING, "z_loss"),
                (by_batch, by_sequence, by_step, logits.logsumexp(dim=-1).square().mean()),
                strict=True,
            ):
                total, count = numbers.get(f"by_hand_{name}", (0, 0))
                numbers[f"by_hand_{name}"] = total + value, count + one
        self.chosen.append(chosen)
        if len(self.chosen) == self.micro_batches:
            steps = [self.chosen.pop(0) for _ in range(self.micro_batches)]
            counts = torch.stack([sum(kept[router] for kept in steps) for router, _ in watched])
            for name, value in zip(OF_TOKENS, (counts.min(), counts.mean(), counts.max()), strict=True):
                numbers[f"by_hand_{name}"] = value, one
        return good._replace(numbers=numbers)


OBJECTIVE = ByHand
