"""Whether what starts the processes, this command, Slurm or torchrun, can start those that a configuration asks for."""

from bridge.config import layout
from bridge.config.layout import rows
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.launch import inputs, torchrun


def check_local(config: RunConfig) -> None:
    """ConfigError for a run that this command cannot start by itself, on this machine."""
    if config.train.num_nodes > 1:
        raise ConfigError(
            f"train.num_nodes: {config.train.num_nodes} nodes, but this command can only start processes on this "
            "machine; add hydra/launcher=slurm, or run torchrun on every node"
        )
    if config.launch.detach:
        raise ConfigError(
            "launch.detach: true needs Slurm: nothing else would keep the run alive; add hydra/launcher=slurm, or "
            "run `nohup python train.py ... &`"
        )
    inputs.check(config)


def check_restarts(config: RunConfig, *, starter: str, instead: str) -> None:
    """ConfigError for launch.max_restarts where `starter` starts the workers; `instead`: what to use there."""
    if config.launch.max_restarts > 0:
        raise ConfigError(
            f"launch.max_restarts: {config.launch.max_restarts} is for workers that train.py starts itself, but "
            f"{starter} started these; {instead}"
        )


def check_layout(config: RunConfig, *, world_size: int) -> None:
    """The rules of the layout on so many processes."""
    layout.check(
        config.routed,
        world_size=world_size,
        sequence_length=config.data["sequence_length"],
        train=config.train,
    )
    rows.check(config.routed, config.data)


def check_world(config: RunConfig) -> None:
    """ConfigError unless `config` fits the processes that torchrun, or tasks of Slurm, have started."""
    world_size, per_node = torchrun.world_size(), torchrun.local_world_size()
    if config.launch.detach:
        raise ConfigError(f"launch.detach: true, but {torchrun.starter()} runs the processes; leave it out")
    restarts = config.launch.max_restarts
    check_restarts(config, starter=torchrun.starter(), instead=f"use `torchrun --max-restarts={restarts}`")
    if config.train.num_devices not in (None, per_node):
        raise ConfigError(
            f"train.num_devices: {config.train.num_devices} differs from the {per_node} processes that "
            f"{torchrun.starter()} started on this node; leave it out under {torchrun.starter()}"
        )
    if config.train.num_nodes not in (1, world_size // per_node):
        raise ConfigError(
            f"train.num_nodes: {config.train.num_nodes} differs from the {world_size // per_node} nodes of "
            f"{torchrun.starter()}; leave it out under {torchrun.starter()}"
        )
    check_layout(config, world_size=world_size)
    inputs.check(config)
