"""megatron-core's data parallelism around model chunks."""

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.utils import get_model_config


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
