"""Hydra's own sweeper (`a,b`, `range`, `choice`, `glob`) for bridge: all points are checked before the first is run."""

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from bridge.errors import ConfigError
from bridge.launch import compose


class GridSweeper(BasicSweeper):
    """Composes every point, hands them to the task function's `check_points`, then launches them.

    `check_points` says whether there is anything to launch. A job that fails ends no sweep.
    """

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        of_file = [f"{key}={value}" for key, value in self.params.items()]
        batches = self.split_arguments(parser.parse_overrides([*of_file, *arguments]), self.max_batch_size)
        if not self.task_function.check_points(list(self._points(chain.from_iterable(batches)))):
            return []
        directory = Path(str(self.config.hydra.sweep.dir))
        try:
            if directory != Path():  # conf/convert.yaml: nothing is written
                directory.mkdir(parents=True, exist_ok=True)
                OmegaConf.save(self.config, directory / "multirun.yaml")
        except OSError as error:
            raise ConfigError(f"hydra.sweep.dir: {directory} cannot be written ({error.strerror})") from error
        returns: list[Sequence[JobReturn]] = []
        for batch in batches:
            returns.append(self.launcher.launch(batch, initial_job_idx=sum(map(len, returns))))
        return returns

    def setup(self, *, task_function: Any, **others: Any) -> None:
        super().setup(task_function=task_function, **others)
        self.task_function = task_function

    def _points(self, grid: Iterator[list[str]]) -> Iterator[compose.Point]:
        """Each as the launchers will compose it, or what is wrong with it."""
        outside = HydraConfig.instance().cfg
        try:
            for number, overrides in enumerate(grid):
                swept = compose.swept_among(overrides, sys.argv[1:])
                try:
                    job = compose.job_of(self._composed(number, overrides), sys.argv[1:])
                except Exception as error:
                    yield compose.Point(number, swept, error=compose.as_config_error(error))
                else:
                    yield compose.Point(number, swept, job)
        finally:
            HydraConfig.instance().cfg = outside

    def _composed(self, number: int, overrides: list[str]) -> DictConfig:
        """The job's configuration without `hydra`, which is set as Hydra's own."""
        assert self.config is not None and self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with read_write(config), open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            HydraConfig.instance().set_config(config)
            with read_write(config.hydra.runtime):
                directory = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
                config.hydra.runtime.output_dir = os.path.abspath(directory)
            HydraConfig.instance().set_config(config)
        job = copy.deepcopy(config)
        with read_write(job), open_dict(job):
            del job["hydra"]
        return job
