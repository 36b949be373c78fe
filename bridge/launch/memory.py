"""A model larger than the memory is refused before it is built; a run that ran out of memory says what helps."""

import os

from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.platform import memory as here

MARGIN = 0.9  # estimates are right within a tenth: what might fit is tried
_INSTEAD = (
    "a smaller train.micro_batch_size or data.sequence_length, precision=bf16, or more devices and a layout that "
    "divides the model (plan=true proposes some)"
)
_OFFLOADS = ("cpu_offloading", "fine_grained_activation_offloading")


def check(config: RunConfig) -> None:
    """ConfigError when what the run needs at least is more than there is, unless launch.check_memory is false.

    Called by a worker, which knows the number of processes by WORLD_SIZE and LOCAL_WORLD_SIZE, before it builds.
    """
    if not config.launch.check_memory:
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        stages = _bytes_of_stages(config, world_size=world_size)
    except ConfigError:  # for the build to tell, which comes next
        return
    gpu = here.gpu_memory_bytes()
    if gpu is not None:
        needed, there, what = max(stages), gpu, "a process, but its GPU"
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
        needed, there = local * sum(stages) // len(stages), here.machine_memory_bytes()
        what = f"{local} processes, but this machine" if local > 1 else "the process, but this machine"
    if MARGIN * needed > there:
        raise ConfigError(
            f"model: needs about {_gib(needed)} GiB for {what} has {_gib(there)} GiB (dry_run=true says where it "
            f"goes); set {_INSTEAD}, or launch.check_memory=false to try anyway"
        )


def explained(config: RunConfig) -> str:
    """One line for a run that ran out of memory."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    needed = max(_bytes_of_stages(config, world_size=world_size))
    return f"out of memory: a process needs about {_gib(needed)} GiB (dry_run=true says where it goes); set {_INSTEAD}"


def _bytes_of_stages(config: RunConfig, *, world_size: int) -> list[int]:
    """What a process of each pipeline stage needs at least."""
    from bridge import estimate  # imports megatron-core

    stages = estimate.memory(config, world_size=world_size)
    if config.eval_only:
        return [stage.weights for stage in stages]
    if any(config.routed.transformer.get(name) for name in _OFFLOADS):
        return [stage.total - stage.activations for stage in stages]
    return [stage.total for stage in stages]


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f}"
