"""The launcher behind `hydra/launcher=slurm`. Hydra takes plugins from the namespace package hydra_plugins only."""

import math
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus

from bridge.errors import ConfigError
from bridge.launch import compose, hydra_keys, ranks, slurm


class SlurmLauncher(BasicLauncher):
    """Prepares the jobs of a batch one after the other in this process; then they run side by side in Slurm.

    The task function returns a slurm.Queued for each job that can be submitted.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()  # the options reach bridge.launch.slurm with each job

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        returns = super().launch(job_overrides, initial_job_idx)
        prepared = [each for each in returns if each.status == JobStatus.COMPLETED]
        queued = [(each, each.return_value) for each in prepared if isinstance(each.return_value, slurm.Queued)]
        jobs = [job for _, job in queued]
        assert self.config is not None
        sweeper = self.config.hydra.sweeper._target_
        if any(job.config.launch.detach for job in jobs) and not hydra_keys.is_grid(self.config.hydra.sweeper):
            raise ConfigError(
                f"launch.detach: true, and {sweeper.split('.')[-1]} chooses jobs by the results of earlier ones; leave "
                f"one of the two out"
            )
        slurm.run(jobs, ended=ranks.print_ending)
        for each, job in queued:
            each.return_value = job.result.objective
            if each.return_value is None and compose.counts_failures(self.config.hydra):
                each.return_value, each.status = compose.FailedTrial(job.result.error), JobStatus.FAILED
            elif each.return_value is None:
                each.return_value = math.inf
        return returns
