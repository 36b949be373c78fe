"""What a model measures of itself in a step: losses that balance its experts, losses of its prediction modules, and how
many tokens its experts got. Sums and counts of this rank, which are means once those of all ranks are added up.

megatron-core's own trackers are one per process, so a second model would write into them, and their means are not those
of one process: the z-loss is that of one rank, a prediction loss the mean of means over different numbers of tokens.
Forward passes that are repeated for recomputation count once, as only one of the two has a gradient.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from bridge import platform
from bridge.models.gpt import GPT
from bridge.models.modules.router import BALANCING, Router

TOKENS_PER_EXPERT = ("tokens_per_expert_min", "tokens_per_expert_mean", "tokens_per_expert_max")


class Sums(NamedTuple):
    """sums: float64 [names, 2], sum and count of each, 0 where this rank has no such module. experts:
    float64 [layers and prediction modules, experts], the tokens each expert got; rows of 0 elsewhere, [0, 0] without
    experts."""

    names: tuple[str, ...]
    sums: Tensor
    experts: Tensor


def names(config: Any) -> tuple[str, ...]:
    """What a model with this configuration measures but for its experts, the same on every rank."""
    found: list[str] = []
    if config.num_moe_experts is not None:
        kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
        if isinstance(kinds, str):
            kinds, coefficients = [kinds], [coefficients]
        asked = {kind for kind, coefficient in zip(kinds, coefficients, strict=True) if coefficient}
        found += [name for kind, name in BALANCING.items() if kind in asked]
        found += ["z_loss"] * (config.moe_z_loss_coeff is not None)
    return (*found, *(f"mtp_{number}_loss" for number in range(1, (config.mtp_num_layers or 0) + 1)))


def reset(model: Sequence[Any]) -> None:
    """Begin a step: count from 0."""
    for chunk in _of_this_package(model):
        chunk.start_measuring()
        for _, router in _routers(chunk):
            router.start_measuring()


def collect(model: Sequence[Any]) -> Sums:
    """What was measured on this rank since `reset`."""
    config = get_model_config(model[0])
    wanted = names(config)
    place = {name: index for index, name in enumerate(wanted)}
    sums = torch.zeros(len(wanted), 2, dtype=torch.float64, device=platform.device())
    rows = 0 if config.num_moe_experts is None else config.num_layers + (config.mtp_num_layers or 0)
    experts = torch.zeros(rows, config.num_moe_experts or 0, dtype=torch.float64, device=platform.device())
    for chunk in _of_this_package(model):
        found = list(chunk.measured())
        for row, router in _routers(chunk):
            found += router.measured()
            experts[row] += router.tokens_per_expert
        for name, pair in found:
            if name in place:
                sums[place[name]] += pair
    return Sums(wanted, sums, experts)


def of_experts(experts: Tensor) -> dict[str, float]:
    """Of `Sums.experts` of all ranks together: tokens of the expert with the fewest, of one in the mean, with the most,
    over all experts of all layers. Empty without experts."""
    with_experts = experts[experts.sum(dim=1) > 0]
    if not with_experts.numel():
        return {}
    values = (with_experts.min(), with_experts.mean(), with_experts.max())
    return {name: value.item() for name, value in zip(TOKENS_PER_EXPERT, values, strict=True)}


def _of_this_package(model: Sequence[Any]) -> list[GPT]:
    """The bare chunks of a model, unless they are another GPTModel than ours, which measures nothing."""
    return [chunk for chunk in unwrap_model(list(model)) if isinstance(chunk, GPT)]


def _routers(chunk: GPT) -> Iterator[tuple[int, Router]]:
    """Each router of a chunk, and the number of its layer in the whole model, from 0; prediction modules come last."""
    layers = [(layer.layer_number - 1, layer) for layer in chunk.decoder.layers]
    if chunk.mtp_process:
        modules = enumerate(chunk.mtp.layers, start=chunk.config.num_layers)
        layers += [(number, module.transformer_layer) for number, module in modules]
    for number, layer in layers:
        router = getattr(layer.mlp, "router", None)
        if isinstance(router, Router):
            yield number, router
