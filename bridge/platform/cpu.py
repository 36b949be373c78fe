"""megatron-core calls torch.cuda directly, in 134 places on the paths used here. Without CUDA they land on the CPU.

Written against megatron-core 0.16.1. Wrapping the torch names was measured against a TorchFunctionMode: that makes a
small model 1.15-1.75 times slower and cannot see torch.cuda functions at all.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.utils._device

CPU = torch.device("cpu")


def import_megatron_without_compiling() -> None:
    """Import megatron.core with its fusing decorator as a pass-through.

    `jit_fuser` is torch.compile: 1-10 s at each first call, a C++ compiler, and 2-5 s of import time. Functions are
    decorated while megatron.core is imported, so its own `disable_jit_fuser()` comes too late.
    """
    if "megatron.core" in sys.modules:
        torch.compiler.set_stance("force_eager")
        return
    compile_ = torch.compile
    torch.compile = cast(Any, _uncompiled)
    try:
        import megatron.core.jit  # noqa: F401
    finally:
        torch.compile = compile_


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """Stands for torch.compile, as a decorator with and without arguments: the function stays as it is."""
    return (lambda decorated: decorated) if function is None else function


def leave_dynamo_out() -> None:
    """Let optimizers work without torch._dynamo, whose import at the first of them takes 0.5 s.

    torch keeps these methods from being compiled by a wrapper that it makes at their first call and stores at this
    name (torch/_compile.py); nothing is compiled here.
    """
    optimizer = torch.optim.Optimizer
    for method in (optimizer.add_param_group, optimizer.load_state_dict, optimizer.state_dict, optimizer.zero_grad):
        function = getattr(method, "__wrapped__", None)
        if function is not None:
            function.__dynamo_disable = function


class NullStream:
    """A stream on which everything is already done: the CPU computes in program order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NullStream)

    __hash__ = object.__hash__

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> "NullEvent":
        return NullEvent()


class NullEvent:
    """An event that happens when it is recorded; `elapsed_time` is in milliseconds, as CUDA's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0.0

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "NullEvent") -> float:
        return (end.time - self.time) * 1e3


def nothing(*_: Any, **__: Any) -> None:
    """What a CUDA housekeeping call does on CPU."""


def redirect_cuda_calls() -> None:
    """Point the torch.cuda functions, the CUDA literals of tensor constructors and Tensor methods at the CPU."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU  # megatron-core uses it only as device=torch.cuda.current_device()
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, functools.partial(nothing))  # one object each: torch._dynamo rejects aliases
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, functools.partial(nothing))
    cuda.Stream, cuda.Event = NullStream, NullEvent
    cuda.current_stream = lambda *_: NullStream()
    cuda.default_stream = lambda *_: NullStream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: nothing(torch.manual_seed(seed))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.record_stream = nothing
    tensor.type = type_for_optimizers(torch.Tensor.type)
    # torch.device(...) as a context lists the constructors at its first use, for good: let it list the real ones.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, made_on_cpu(getattr(torch, name)))


def made_on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make` with device="cuda" meaning the CPU and pin_memory dropped (pinning needs a CUDA driver)."""

    @functools.wraps(make, assigned=("__name__", "__doc__"))
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return wrapper


def type_for_optimizers(type_method: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type that tells megatron.core.optimizer "torch.cuda.FloatTensor": it refuses any other name."""

    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_method(self, *args, **kwargs)
        asked = not args and not kwargs
        if asked and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return wrapper


def redirect_random_states() -> None:
    """Let megatron-core's tensor-parallel random states be states of the CPU generator."""
    import megatron.core.tensor_parallel.random as random

    class CpuStatesTracker(random.CudaRNGStatesTracker):
        """The tracker without its warning that the CPU state changed inside a fork: here it must change."""

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    module: Any = random
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    module.CudaRNGStatesTracker = CpuStatesTracker
