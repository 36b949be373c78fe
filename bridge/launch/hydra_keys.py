"""Hydra's own settings that would do nothing here, or fail deep inside a launcher: refused before anything is made."""

import shutil

from omegaconf import DictConfig, OmegaConf

from bridge.errors import ConfigError
from bridge.launch import slurm

SUBMITIT = "hydra_plugins.hydra_submitit_launcher."
SUBMITIT_SLURM = f"{SUBMITIT}submitit_launcher.SlurmLauncher"
# Ends of the launchers that start no processes of their own on this machine: Hydra's, and those of Slurm jobs.
NOT_TIED = (".BasicLauncher", slurm.TARGET, SUBMITIT_SLURM)
GRIDS = (".BasicSweeper", ".GridSweeper")  # ends of the sweepers that know all their jobs beforehand


def is_grid(sweeper: DictConfig) -> bool:
    return str(sweeper.get("_target_")).endswith(GRIDS)


def check_run(config: DictConfig) -> None:
    """Of a single run."""
    hydra = config.hydra
    used = hydra.job.chdir or hydra.output_subdir is not None
    if str(hydra.run.dir) != "." and not used and hydra.runtime.choices.get("hydra/job_logging") == "disabled":
        raise ConfigError(
            f"hydra.run.dir: {hydra.run.dir} would stay empty, the run directory is runs_dir/name; set runs_dir and "
            f"name, or hydra.job.chdir=true to work there"
        )
    _check_launcher(config)


def check_sweep(config: DictConfig) -> None:
    """Of a multirun."""
    if _dry(config) and not is_grid(config.hydra.sweeper):
        key = "dry_run" if config.dry_run else "plan"
        sweeper = str(config.hydra.sweeper.get("_target_")).rpartition(".")[-1]
        raise ConfigError(
            f"{key}: true, but {sweeper} chooses jobs by the results of earlier ones; leave hydra/sweeper out"
        )
    _check_launcher(config)


def _check_launcher(config: DictConfig) -> None:
    names = {slurm.TARGET: "slurm", SUBMITIT_SLURM: "submitit_slurm"}
    name = names.get(str(OmegaConf.select(config, "hydra.launcher._target_")))
    if name is not None and not _dry(config) and shutil.which("srun") is None:
        raise ConfigError(f"hydra/launcher: {name} needs srun, which is not on the PATH; run this where Slurm works")


def _dry(config: DictConfig) -> bool:
    return bool(config.get("dry_run") or config.get("plan"))
