"""megatron-core's data parallelism around model chunks."""

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.utils import get_model_config
from torch import Tensor


def wrap(chunks: Sequence[Any], settings: DistributedDataParallelConfig) -> list[DistributedDataParallel]:
    """DistributedDataParallel around each chunk.

    Only the first chunk's gradients are bucketed: the others are in flight while its backward still runs, so that
    splitting them would only add messages.
    """
    return [
        DistributedDataParallel(
            config=get_model_config(chunk), ddp_config=settings, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(chunks)
    ]


def release(model: Sequence[DistributedDataParallel]) -> None:
    """Let go of chunks that train no more, and of their optimizer.

    By way of autograd's nodes, where Python's collector of cycles does not look, they hold themselves: a node has DDP's
    hook, and in fp32 the distributed optimizer's shards, views of the parameters, have the nodes, as have the tensors
    that a token dispatcher keeps of its last batch. A process that trains again would keep memory and process groups.
    """
    for chunk in model:
        chunk.grad_accs.clear()
        get_model_config(chunk).grad_scale_func = None  # a method of the optimizer
        for parameter in chunk.parameters():
            vars(parameter).pop("main_param", None)  # its shard
        for module in chunk.modules():
            if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
                kept = [name for name, value in vars(dispatcher).items() if isinstance(value, Tensor) and value.grad_fn]
                vars(dispatcher).update(dict.fromkeys(kept))
