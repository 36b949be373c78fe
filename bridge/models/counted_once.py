"""Which parameters enter the norm of the gradient on which tensor rank, so that each counts once.

megatron-core counts a parameter on tensor rank 0, and on the others if it is marked `tensor_model_parallel`
(tensor_parallel/layers.py: param_is_not_tensor_parallel_duplicate). Every module marks its own, and some are wrong:
attention sinks are divided over heads, and not marked; Transformer Engine marks layers that are whole on every rank;
biases of experts that are whole differ from rank to rank with expert parallelism, and are not marked. The norm, and
clipping by it, then depends on the layout. What is a part and what a copy is known to the description of the model by
which a checkpoint has every tensor once.
"""

import torch

from bridge import parallel
from bridge.weights import shards


def mark(chunk: torch.nn.Module) -> None:
    """Set `tensor_model_parallel` of each parameter of a model chunk, where tensor ranks may hold copies."""
    if parallel.rank("tp") == 0:  # everything counts here
        return
    own = {id(parameter): parameter for parameter in chunk.parameters()}
    for tensor in shards.entries(chunk):
        if id(tensor.data) in own:
            _, number_of_copy, _ = tensor.replica_id  # over pipeline, tensor (an expert's are its own) and data ranks
            own[id(tensor.data)].tensor_model_parallel = number_of_copy == 0  # type: ignore[attr-defined]
