"""next_token that also measures the mean probability of the labels that count."""

from dataclasses import dataclass
from typing import Any

from bridge.objectives.next_token import NextToken
from bridge.objectives.objective import Loss


@dataclass(frozen=True)
class Probability(NextToken):
    """A number of its own, over the tokens that loss_mask counts."""

    name: str = "tests.training.probability"
    numbers = ("probability",)

    def loss(self, output: Any, batch: Any) -> Loss:
        good = super().loss(output, batch)
        total = ((-output.detach()).exp() * batch["loss_mask"]).sum()
        return good._replace(numbers={"probability": (total, good.divisor)})


OBJECTIVE = Probability
