"""next_token that on one rank, in some steps, reports another loss than it should, or has another gradient."""

import os
from dataclasses import dataclass, field
from typing import Any

from bridge.objectives.next_token import NextToken
from bridge.objectives.objective import Loss


@dataclass(frozen=True)
class Bad(NextToken):
    """From the computation number `first` of a step's gradients on, counted from 1 as this process makes them, for
    `computations` of them: the loss is `factor`, its gradient `gradient` times what it should be."""

    name: str = "tests.training.bad_objective"
    rank: int = 0
    first: int = 1
    computations: int = 1
    micro_batches: int = 1  # of this rank in a step
    factor: float = 1.0
    gradient: float = 1.0
    seen: list[int] = field(default_factory=list)

    def loss(self, output: Any, batch: Any) -> Loss:
        import torch

        good = super().loss(output, batch)
        if not torch.is_grad_enabled():  # an evaluation
            return good
        self.seen.append(0)
        number = (len(self.seen) - 1) // self.micro_batches + 1
        if os.environ["RANK"] != str(self.rank) or not self.first <= number < self.first + self.computations:
            return good
        total = good.total + (self.factor - 1) * good.total.detach()
        total.register_hook(lambda gradient: gradient * self.gradient)
        return good._replace(total=total)


OBJECTIVE = Bad
