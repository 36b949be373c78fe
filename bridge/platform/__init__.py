"""Everything that differs between CUDA and CPU. No other package asks which of the two it runs on.

`prepare()` must run before a megatron-core module is built. On CUDA with Transformer Engine it changes nothing; without
Transformer Engine it fills in the names megatron-core forgets, and without CUDA it sends megatron-core's hard-coded
CUDA calls to the CPU. Importing this package costs no torch: the driver asks `num_devices()` before a worker starts.
"""

from bridge.platform.adapt import prepare
from bridge.platform.defaults import check, default_fields, honoured
from bridge.platform.devices import (
    backend,
    device,
    device_name,
    has_transformer_engine,
    mark,
    may_have_gpu,
    num_devices,
    peak_memory_bytes,
    seconds_between,
    set_local_rank,
    synchronize,
)
from bridge.platform.remembered import forget_models
from bridge.platform.switches import set_switches

__all__ = [
    "backend",
    "check",
    "default_fields",
    "device",
    "device_name",
    "forget_models",
    "has_transformer_engine",
    "honoured",
    "mark",
    "may_have_gpu",
    "num_devices",
    "peak_memory_bytes",
    "prepare",
    "seconds_between",
    "set_local_rank",
    "set_switches",
    "synchronize",
]
