"""megatron-core's `use_cpu_initialization` without the whole weights that it makes, draws and cuts slices out of."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Inside, the function that initialises a weight is called with this rank's slice alone, as on a GPU."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import layers

    modules: tuple[Any, ...] = (layers, transformer_engine)
    whole = layers._initialize_affine_weight_cpu

    def initialise_slice(
        weight: Any,
        output_size: int,
        input_size: int,
        per_partition_size: int,
        partition_dim: int,
        init_method: Any,
        stride: int = 1,
        *,
        skip_set_tensor_parallel_attributes: bool = False,
        **_: Any,
    ) -> None:
        if not skip_set_tensor_parallel_attributes:
            layers.set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=stride)
        init_method(weight)

    for module in modules:
        module._initialize_affine_weight_cpu = initialise_slice
    try:
        yield
    finally:
        for module in modules:
            module._initialize_affine_weight_cpu = whole
