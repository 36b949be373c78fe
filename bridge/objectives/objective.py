"""What an objective is: a frozen dataclass whose fields are the keys of the section `objective`. No torch is imported.

A module (`bridge.objectives.<name>`, or a dotted name outside the tree) names its class OBJECTIVE. The driver imports
it too, to check the keys: what needs torch is imported inside the methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from bridge.config import modules, sections

if TYPE_CHECKING:
    from torch import Tensor

    from bridge.data.batch import Batch


class Loss(NamedTuple):
    """What one micro-batch has to say, on this rank: sums over what it has of it, never means.

    The loss of a step is the sum of all `total` over the sum of all `divisor`: of every micro-batch and every data- and
    context-parallel rank, so it does not depend on how a batch is divided.
    """

    total: "Tensor"
    """Scalar with a gradient: the sum of the losses that count."""
    divisor: "Tensor"
    """Scalar: the sum of their weights, which is how many those are (tokens; of preferences, pairs) if all count 1."""
    numbers: Mapping[str, tuple["Tensor", "Tensor"]] = {}
    """name -> (sum, count), scalars; reported is the sum over the count of all micro-batches and ranks."""


@dataclass(frozen=True)
class Objective(ABC):
    """Tells a step what to read, how to run the model and what to minimise. Knows no rank and no layout."""

    name: str
    numbers: ClassVar[tuple[str, ...]] = ()
    """The names in Loss.numbers; in evaluations they begin with eval_."""
    has_perplexity: ClassVar[bool] = False
    """Whether the loss is a cross entropy in nats per token: then evaluations report its exponential, too."""

    @abstractmethod
    def keys(self, chunk: Any) -> tuple[str, ...]:
        """The keys of a batch that `forward` and `loss` need of it on the device for this chunk of the model, a bare
        GPT. For none, no batch is read: so for chunks without embedding and output, unless attention asks for one."""

    @abstractmethod
    def forward(self, model: Callable[..., Any], batch: "Batch") -> Any:
        """Run `model`, called as megatron-core's GPTModel, on the tensors that `keys` named.

        On the last pipeline stage the result goes to `loss`; on the others it is what the model gave.
        """

    @abstractmethod
    def loss(self, output: Any, batch: "Batch") -> Loss:
        """The loss of one micro-batch, or of this context-parallel rank's part of it."""

    @abstractmethod
    def lengths(self, batch: "Batch") -> "Tensor":
        """int64: the length in tokens of each sequence of a micro-batch, as loaded: whole, and without its padding.

        Throughput counts their sum, model FLOPs also their squares.
        """


def build(section: Mapping[str, Any]) -> Objective:
    """The objective that a checked section asks for."""
    module = modules.load("objective.name", section["name"], "objectives")
    objective: Objective = sections.build(modules.options(module), section, "objective")
    return objective
