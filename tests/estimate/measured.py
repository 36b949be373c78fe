"""What one rank of a real step holds: live tensors, and what autograd keeps between forward and backward."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from bridge import parallel
from bridge.config.run_config import RunConfig
from tests.training.runs import one_step


class Measured(NamedTuple):
    """Bytes. kept: of distinct storages saved for backward, when most were, weights and buffers left out."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    kept: int


def step(run: RunConfig) -> Measured:
    """One training step of `run` as this rank of a world, a worker of tests.distributed."""
    from bridge.training import batches, setup

    data = setup.prepare_data(run)
    parallel.initialize(run.routed.transformer, seed=run.train.seed)
    job = setup.build(run, data)
    size = run.train.sequences_per_pass(parallel.size("dp"))
    count = run.train.global_batch_size // (size * parallel.size("dp"))
    model = job.state.model
    streams = [batches.training(job.datasets.train, train=run.train, consumed=0, num_workers=0) for _ in model]
    saved = Saved(_storages(_static(job.state)))
    with saved.watching():
        one_step(job, streams, micro_batch_size=size, num_microbatches=count)
    weights, gradients, optimizer = (sum(_storages(part).values()) for part in _parts(job.state))
    return Measured(parallel.rank("pp"), weights, gradients, optimizer, saved.peak)


class Held:
    """A saved tensor; autograd's reference to it is the only one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Saved:
    """The bytes of storages that autograd holds, each once, and their peak; those in `known` do not count."""

    def __init__(self, known: dict[int, int]) -> None:
        self.known, self.held, self.peak = known, weakref.WeakSet[Held](), 0

    def watching(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: torch.Tensor) -> Held:
        held = Held(tensor)
        self.held.add(held)
        # Now, not as they were when saved: recomputation frees some storages that stay saved.
        sizes = _storages(held.tensor for held in self.held)
        self.peak = max(self.peak, sum(sizes[key] for key in sizes.keys() - self.known.keys()))
        return held


def _parts(state: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Weights, gradient buffers, and the optimizer's own tensors."""
    weights = [weight.data for chunk in state.model for weight in chunk.parameters()]
    buffers = [buffer for chunk in state.model for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    gradients = [buffer.grad_data for buffer in buffers]
    optimizers = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    inner = [part.optimizer for part in optimizers if part.optimizer is not None]
    main = [p.data for part in inner for group in part.param_groups for p in group["params"]]
    moments = [value for part in inner for held in part.state.values() for value in held.values()]
    own = [tensor for tensor in main + moments if isinstance(tensor, torch.Tensor) and tensor.dim()]
    known = _storages(weights)
    return weights, gradients, [tensor for tensor in own if tensor.untyped_storage().data_ptr() not in known]


def _static(state: Any) -> list[torch.Tensor]:
    buffers = [buffer for chunk in state.model for buffer in chunk.module.buffers()]
    weights, gradients, own = _parts(state)
    return weights + gradients + own + buffers


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
