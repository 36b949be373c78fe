"""megatron-core's router with balancing losses that do not depend on the layout, and with the choice of experts of a
Hugging Face family where its own differs."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from bridge import platform
from bridge.errors import ConfigError, shown

# moe_router_load_balancing_type -> the name that its loss has in a report, megatron-core's.
BALANCING = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
MEASURED = (*BALANCING.values(), "z_loss")
# What takes the choice out of the router's hands, and the value that leaves it there.
REFUSED = (
    ("moe_router_fusion", False),
    ("moe_enable_routing_replay", False),
    ("moe_router_force_load_balancing", False),
)


def chooses_otherwise(config: Any) -> bool:
    """Whether this model's choice is not the one megatron-core has (moe_utils.topk_routing_with_score_function).

    That adds a bias to sigmoid scores only, always divides these by their sum, without a least sum, and scores a group
    of experts by its best moe_router_topk // moe_router_group_topk.
    """
    topk, group_topk, best = config.moe_router_topk, config.moe_router_group_topk, config.moe_router_group_score_topk
    return (
        (config.moe_router_enable_expert_bias and config.moe_router_score_function == "softmax")
        or config.norm_topk_prob not in (None, _normed_by_megatron(config))
        or config.moe_norm_min is not None
        or bool(group_topk and best not in (None, topk // group_topk))
    )


def _normed_by_megatron(config: Any) -> bool:
    if config.moe_router_score_function == "softmax":
        return not config.moe_router_pre_softmax
    return config.moe_router_topk > 1


def use(layer: Any, config: Any) -> None:
    """Put `Router` into the specification of a layer with experts."""
    feed_forward = layer.submodules.mlp
    if feed_forward.module is MoELayer:
        feed_forward.submodules.router = Router


class Router(TopKRouter):
    """megatron-core's router; dropping, the balancing losses themselves and updates of the bias are its own.

    Four of its faults are put right. Jitter would go on after training. A backward pass without a schedule would leave
    a scale of the balancing losses in the process (shape []) into which no schedule can put its own (shape [1]). And
    with calculate_per_token_loss every rank scales the gradient of its part of a balancing loss by its own number of
    tokens, where the number in the sequences it shares with its tensor and context ranks is due, and seq_aux_loss by
    that of one sequence: the losses would be weaker the more ranks or sequences there are. global_aux_loss, of which
    each data-parallel rank has a part, would be divided by their number.

    After `start_measuring` it adds up, for training passes with a gradient, what `measured` tells and the tokens that
    each expert got (int64 [experts]).
    """

    sums: Tensor | None = None
    tokens_per_expert: Tensor
    num_real: Tensor | None = None  # tokens without padding of the micro-batch at hand, a scalar; None: all

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        self.own_choice = chooses_otherwise(config)
        if self.own_choice:
            _check(config)
        scaled = copy.copy(config)
        if config.calculate_per_token_loss:
            ranks = pg_collection.tp_cp.size()
            scaled.moe_aux_loss_coeff = _times(config.moe_aux_loss_coeff, ranks)
            scaled.moe_z_loss_coeff = _times(config.moe_z_loss_coeff, ranks)
        super().__init__(config=scaled, pg_collection=pg_collection)
        if MoEAuxLossAutoScaler.main_loss_backward_scale is None:
            MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1, device=platform.device())

    def attach_and_log_load_balancing_loss(self, activation: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """For the tokens of all sequences of this rank, [tokens, experts] in `activation`: of ranks that share
        sequences, where padding may lie on one of them, the mean."""
        kwargs["valid_token_count"] = activation.shape[0] if self.num_real is None else self.num_real
        coefficient, loss, name, sharing, *others = args
        # The loss is the sum of the parts of the ranks in `sharing`: times their number, so that it is the mean.
        self._measure(name, loss.detach() / coefficient * sharing.size(), 1)
        replicas = sharing.size() // self.tp_cp_group.size() if self.calculate_per_token_loss else 1
        parts = (coefficient * replicas, loss * replicas, name, sharing, *others)
        return super().attach_and_log_load_balancing_loss(activation, *parts, **kwargs)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """`logits` [tokens, experts], with the gradient of the z-loss. padding_mask: bool [tokens]."""
        if self._measuring() and self.config.moe_z_loss_coeff is not None:
            squares = torch.logsumexp(logits.detach(), dim=-1).square()
            counted = squares if padding_mask is None else squares[~padding_mask]
            self._measure("z_loss", counted.sum(), counted.numel())
        return super().apply_z_loss(logits, padding_mask=padding_mask)

    def start_measuring(self) -> None:
        """Add up from 0."""
        if self.sums is None:
            self.sums = torch.zeros(len(MEASURED), 2, dtype=torch.float64, device=platform.device())
            experts = self.config.num_moe_experts
            self.tokens_per_expert = torch.zeros(experts, dtype=torch.int64, device=platform.device())
        self.sums.zero_()
        self.tokens_per_expert.zero_()

    def measured(self) -> Iterator[tuple[str, Tensor]]:
        """name -> [sum, count], float64. A balancing loss, without its coefficient, is counted once per micro-batch,
        the z-loss once per token."""
        return iter(() if self.sums is None else zip(MEASURED, self.sums, strict=True))

    def _measuring(self) -> bool:
        return self.sums is not None and self.training and torch.is_grad_enabled()

    def _measure(self, name: str, total: Tensor, count: int) -> None:
        if self._measuring():
            assert self.sums is not None
            row = self.sums[MEASURED.index(name)]  # added to in place, as a CUDA graph would
            row[0] += total
            row[1] += count

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """Noise on hidden states [sequence, batch, hidden], in training alone."""
        return super().apply_input_jitter(input) if self.training else input

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """TopKRouter.routing, with the choice replaced where it is another.

        `logits` [sequence, batch, experts] -> weights (0 where not chosen) and choice (bool), [tokens, experts].
        """
        self.num_real = self._count(padding_mask)
        choosing = self._own_routing if self.own_choice else super().routing
        probs, routing_map = choosing(logits, padding_mask)
        if self._measuring():
            counted = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
            self.tokens_per_expert += counted.sum(dim=0)
        return probs, routing_map

    def _count(self, padding_mask: Tensor | None) -> Tensor | None:
        """The mean of the numbers of real tokens of the ranks that share sequences."""
        if padding_mask is None or not (self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled()):
            return None
        real = (~padding_mask).sum(dtype=torch.float32)
        torch.distributed.all_reduce(real, group=self.tp_cp_group)
        return real / self.tp_cp_group.size()

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """megatron-core's mask, [tokens], does not fit its choice, [tokens, experts]."""
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.view(-1, 1)
        super()._apply_expert_bias(routing_map)

    def _own_routing(self, logits: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        length, batch = logits.shape[:2]
        logits = logits.view(-1, self.config.num_moe_experts)
        padding_mask = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        probs, routing_map = choose(logits, self.expert_bias, self.config)
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            chosen, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=padding_mask
            )
            masked = {"with_padding_mask": padding_mask is not None}
            probs = self._apply_aux_loss(probs, scores, chosen, **masked)
            probs = self._apply_seq_aux_loss(probs, scores, chosen, length, batch, **masked)
            probs = self._apply_global_aux_loss(probs, scores, chosen, **masked)
        self._apply_expert_bias(routing_map, padding_mask=padding_mask)
        return probs, routing_map


def _check(config: Any) -> None:
    for field, harmless in REFUSED:
        if getattr(config, field) != harmless:
            raise ConfigError(
                f"model.{field}: {shown(getattr(config, field))} cannot be combined with this model's choice of "
                f"experts; set {harmless}"
            )
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise ConfigError(
            "model.moe_router_load_balancing_type: sinkhorn cannot be combined with this model's choice of experts; "
            "set aux_loss"
        )


def _times(coefficient: Any, factor: int) -> Any:
    """A coefficient, several, or none, each times `factor`."""
    if coefficient is None or isinstance(coefficient, list):
        return coefficient and [one * factor for one in coefficient]
    return coefficient * factor


def choose(logits: Tensor, expert_bias: Tensor | None, config: Any) -> tuple[Tensor, Tensor]:
    """Weights and choice of experts, [tokens, experts], from logits [tokens, experts] and a bias [experts].

    Scores, bias and sums are float32. transformers: DeepseekV2TopkRouter, DeepseekV3TopkRouter (2412.19437, 2.1.2),
    Ernie4_5_MoeTopKRouter.
    """
    softmax = config.moe_router_score_function == "softmax"
    scores = torch.softmax(logits, dim=-1, dtype=torch.float32) if softmax else torch.sigmoid(logits.float())
    ranked = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    if config.moe_router_group_topk:
        ranked = ranked.masked_fill(~_open_experts(ranked, config), float("-inf"))
    indices = torch.topk(ranked, config.moe_router_topk, dim=-1).indices
    weights = scores.gather(-1, indices)
    normed = config.norm_topk_prob
    if _normed_by_megatron(config) if normed is None else normed:
        total = weights.sum(dim=-1, keepdim=True)
        least = config.moe_norm_min
        weights = weights / (total + 1e-20 if least is None else total.clamp(min=least))
    if config.moe_router_topk_scaling_factor:
        weights = weights * config.moe_router_topk_scaling_factor
    probs = torch.zeros_like(logits).scatter(-1, indices, weights.type_as(logits))
    return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, True)


def _open_experts(scores: Tensor, config: Any) -> Tensor:
    """Experts of the groups that are open to a token, bool [tokens, experts]."""
    tokens, experts = scores.shape
    groups, chosen = config.moe_router_num_groups, config.moe_router_group_topk
    best = config.moe_router_group_score_topk or config.moe_router_topk // chosen
    by_group = scores.view(tokens, groups, -1).topk(best, dim=-1).values.sum(dim=-1)
    is_open = torch.zeros_like(by_group, dtype=torch.bool)
    is_open = is_open.scatter(-1, by_group.topk(chosen, dim=-1).indices, True)
    return is_open[:, :, None].expand(tokens, groups, experts // groups).reshape(tokens, experts)
