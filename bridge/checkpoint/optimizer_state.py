"""Optimizer state in a checkpoint: per parameter, under names that no layout and no kind of optimizer changes.

    optimizer.state.exp_avg.KEY, .exp_avg_sq.KEY   moments of the weight KEY, in its shape (SGD: momentum_buffer)
    optimizer.state.fp32_param.KEY                 its 32-bit original, where KEY itself is stored with fewer bits
Beside them, as plain data, stand the number of updates and the state of the loss scaler. megatron-core's optimizers
(plain, distributed, or several in a chain, as with expert parallelism) each wrap these tensors in a state dict of their
own, which none of the others can load. Only the tensors are stored; the wrapping is that of the optimizer that loads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

PREFIX = "optimizer.state."
DISTRIBUTED_MAIN, MAIN = f"{PREFIX}param.", f"{PREFIX}fp32_param."


class Place(NamedTuple):
    """Where in megatron-core's state dict a sharded value stands."""

    holder: Any
    key: Any
    value: ShardedBase


class OptimizerState:
    """megatron-core's state dict of an optimizer, and what of it goes into a checkpoint.

    tensors: this rank's sharded tensors under canonical names, to be saved, or to be handed to megatron-core's load.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, weights: dict[str, Any], *, metadata: dict[str, Any], is_loading: bool
    ) -> None:
        """`weights`: the sharded weights of the model, as `content.weights` gives them. A collective call."""
        self._optimizer = optimizer
        chained = _chained(optimizer)
        if not is_loading:  # before the first update (fp16 leaves steps out) there are no moments yet
            for part in (part for part in chained if part.init_state_fn is not None):
                part.init_state_fn(part.optimizer, part.config)
        with _padding_between_buckets(optimizer):
            self._tree = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(metadata))
        self._parts = [
            (part, self._tree if len(chained) == 1 else self._tree[number]) for number, part in enumerate(chained)
        ]
        for part, state in self._parts:
            _drop_copies_of_weights(part, state)
        self._places = list(_places(self._tree))
        self.tensors = {str(number): _canonical(place.value) for number, place in enumerate(self._places)}

    def plain(self) -> dict[str, Any]:
        """What is stored beside the tensors: {"step": updates so far or None, "grad_scaler": its state or None}."""
        groups = [group for _, state in self._parts for group in _groups(state)]
        steps = {int(group["step"]) for group in groups if group.get("step") is not None}
        assert len(steps) <= 1, f"parameter groups stand at different steps: {sorted(steps)}"
        scalers = [state["grad_scaler"] for _, state in self._parts if "grad_scaler" in state]
        return {"step": steps.pop() if steps else None, "grad_scaler": scalers[0] if scalers else None}

    def restore(self, tensors: dict[str, Any], plain: dict[str, Any]) -> None:
        """Load `tensors`, read from a checkpoint, and its `plain` part. The model must have its weights by now.

        Settings such as rates, betas and weight decay stay those of the optimizer.
        """
        for number, place in enumerate(self._places):
            place.holder[place.key] = tensors[str(number)]
        for part, state in self._parts:
            _add_copies_of_weights(part, state)
            for group in _groups(state):
                if plain["step"] is not None:
                    group["step"] = plain["step"]
            if "grad_scaler" in state and plain["grad_scaler"] is not None:
                state["grad_scaler"] = plain["grad_scaler"]
        with torch.no_grad():  # DistributedOptimizer copies into leaf tensors
            self._optimizer.load_state_dict(self._tree)


def _chained(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _groups(state: dict[Any, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = state.get("optimizer", state)["param_groups"]
    return groups


def _places(node: Any) -> Iterator[Place]:
    """Every sharded value below `node`; objects that megatron-core does not store are unwrapped on the way."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    for key, value in items:
        if isinstance(value, LocalNonpersistentObject):
            node[key] = value.unwrap()
        elif isinstance(value, ShardedBase):
            yield Place(node, key, value)
        else:
            yield from _places(value)


def _canonical(value: ShardedBase) -> ShardedBase:
    if value.key.startswith(DISTRIBUTED_MAIN):
        return replace(value, key=MAIN + value.key.removeprefix(DISTRIBUTED_MAIN))
    return value


@contextmanager
def _padding_between_buckets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let DistributedOptimizer find each parameter's state where it is.

    megatron-core 0.16.1 gathers the buckets of a buffer one behind the other without the padding at their ends, and
    then looks for a parameter at its place in the padded buffer: all behind the first padding would be saved as
    another's state, or as zeros (Megatron-LM pull request 5077). A tied embedding has a bucket of its own at pipeline
    parallelism, large models have many.
    """
    parts: list[Any] = [part for part in _chained(optimizer) if isinstance(part, DistributedOptimizer)]
    for part in parts:
        part.get_parameter_state_dp_zero = _padding_put_back(part)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def _padding_put_back(part: DistributedOptimizer) -> Any:
    gather = part.get_parameter_state_dp_zero

    def gather_and_spread(**options: Any) -> Any:
        state = gather(**options)
        for number, buffer in enumerate(part.buffers):
            for tensors in state[number].values() if len(buffer.buckets) > 1 else ():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[name] = _spread(tensors[name], buffer)
        return state

    return gather_and_spread


def _spread(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """The buckets in `packed`, one behind the other, at their places in a tensor of the buffer's size."""
    spread = packed.new_zeros(buffer.numel)
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    for bucket, piece in zip(buffer.buckets, packed.split(sizes), strict=True):
        spread[bucket.offset : bucket.offset + len(piece)] = piece
    return spread


def _full_precision_weights(part: MegatronOptimizer) -> Iterator[tuple[int, torch.Tensor]]:
    """The 32-bit weights of a DistributedOptimizer with their numbers in its state dict's param_state."""
    if not isinstance(part, DistributedOptimizer):
        return
    weights = (weight for buffer in part.buffers for weight in buffer.param_index_map)
    yield from ((number, weight) for number, weight in enumerate(weights) if weight.dtype == torch.float32)


def _drop_copies_of_weights(part: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Of a weight that is itself 32 bits wide DistributedOptimizer would store a second copy, no other one would."""
    for number, _ in _full_precision_weights(part):
        del state["param_state"][number]["param"]


def _add_copies_of_weights(part: MegatronOptimizer, state: dict[Any, Any]) -> None:
    for number, weight in _full_precision_weights(part):
        state["param_state"][number]["param"] = weight.detach()
