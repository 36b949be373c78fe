"""The state of every random generator a training step may draw from, as plain tensors and tuples."""

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bridge.platform.devices import on_cuda

if TYPE_CHECKING:
    import torch


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's, torch's and the device's generators and of megatron-core's tracker."""
    import numpy
    import torch

    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": tracker_state(),
    }
    if on_cuda():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue every generator where `random_state` saw it; a state of another device kind is left out."""
    import numpy
    import torch

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if ("cuda" in state) != on_cuda():
        return
    set_tracker_state(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Whatever is drawn inside, afterwards every generator is where it was before."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def tracker_state() -> "dict[str, torch.Tensor]":
    """Name -> state, uint8, of the generators in megatron-core's tracker."""
    from megatron.core import tensor_parallel

    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {name: tensor_parallel.random.convert_cuda_rng_state(state) for name, state in states.items()}


def set_tracker_state(state: "dict[str, torch.Tensor]") -> None:
    """Continue the generators where `tracker_state` saw them.

    Transformer Engine's tracker holds generators, which captured graphs draw from: these stay, and are set.
    """
    import torch
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    generators = {name: now for name, now in tracker.get_states().items() if isinstance(now, torch.Generator)}
    for name, generator in generators.items():
        generator.set_state(state[name])
    if not generators:
        tracker.set_states(state)
