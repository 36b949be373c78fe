"""The second linear layer of experts with biases, in megatron-core's local layers."""

from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer


class ExpertRowParallelLinear(RowParallelLinear):
    """RowParallelLinear of an expert that is whole on its rank, the only kind that may have biases (ETP = 1).

    Two of megatron-core's faults are put right. Without expert parallelism it reduces over one rank, which returns its
    input itself; its MLP then adds the bias to that in place, and autograd refuses (`Output 0 of
    _ReduceFromModelParallelRegion is a view`). And under sequence parallelism the gradient of the bias is summed over
    tensor ranks, as if they saw parts of one expert's tokens: with expert parallelism over these ranks they hold
    different experts, and each got the sum of all their gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True
        self.bias.sequence_parallel = False


def use(layer: Any, config: Any) -> None:
    """Put it into a layer whose experts are local ones with biases."""
    if not config.add_bias_linear or layer.submodules.mlp.module is not MoELayer:
        return
    experts = layer.submodules.mlp.submodules.experts
    if experts.module is SequentialMLP and experts.submodules.linear_fc2 is RowParallelLinear:
        experts.submodules.linear_fc2 = ExpertRowParallelLinear
