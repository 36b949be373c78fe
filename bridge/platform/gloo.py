"""Two things NCCL does and gloo (torch 2.13) does not, on the paths of megatron-core 0.16.1 used here."""

from typing import Any

import torch
import torch.distributed


def fill_gaps() -> None:
    """Uneven gather and scatter along dim 0, and split sizes of the MoE token dispatcher as numpy arrays."""
    import megatron.core.tensor_parallel.mappings as mappings_module
    import megatron.core.transformer.moe.token_dispatcher as dispatcher_module

    mappings: Any = mappings_module
    dispatcher: Any = dispatcher_module
    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        x: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, output_split_sizes, use_global_buffer)
        return gather_uneven(x, group, [int(size) for size in output_split_sizes])

    def scatter(
        x: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(x, group, input_split_sizes, use_global_buffer)
        return reduce_scatter_uneven(x, group, [int(size) for size in input_split_sizes])

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter
    # The stock function returns numpy only for CUDA tensors; all_to_all_single then fails on a tensor of sizes.
    dispatcher.maybe_move_tensor_to_cpu = sizes_to_host


def gather_uneven(x: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """All ranks' x, shapes [sizes[rank], ...], joined along dim 0. Padded to the largest: gloo gathers equal pieces."""
    largest = max(sizes)
    out = x.new_empty(largest * len(sizes), *x.shape[1:])
    padding = x.new_zeros(largest - x.size(0), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(out, torch.cat([x, padding]), group=group)
    return torch.cat([piece[:size] for piece, size in zip(out.split(largest), sizes, strict=True)])


def reduce_scatter_uneven(x: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """This rank's piece, sizes[rank] rows, of the sum of x over `group`."""
    total = x.clone()
    torch.distributed.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()


def sizes_to_host(x: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core's maybe_move_tensor_to_cpu for tensors that are on the CPU already."""
    return x.numpy() if as_numpy and torch.is_tensor(x) else x
