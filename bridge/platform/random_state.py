"""The state of every random generator a training step may draw from, as plain tensors and tuples."""

import random
from typing import Any

from bridge.platform.devices import on_cuda


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's, torch's and the device's generators and of megatron-core's tracker."""
    import numpy
    import torch
    from megatron.core import tensor_parallel

    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if on_cuda():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue every generator where `random_state` saw it; a state of another device kind is left out."""
    import numpy
    import torch
    from megatron.core import tensor_parallel

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if ("cuda" in state) != on_cuda():
        return
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
