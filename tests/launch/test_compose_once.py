"""What Hydra is spared in composing changes nothing of what it makes: bridge/launch/compose_once.py."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from bridge.launch import compose
from tests.config.composing import composed

OF_THE_JOB = ("job.id", "job.num", "runtime.output_dir")  # set when a job begins


def without_the_job(hydra: Any) -> Any:
    hydra = OmegaConf.create(OmegaConf.to_container(hydra, resolve=False))
    for key in OF_THE_JOB:
        OmegaConf.update(hydra, key, None, force_add=True)
    return hydra


@pytest.mark.parametrize(
    ("arguments", "jobs", "compositions"),
    [
        (("train.steps=3", "model=gpt2", "hydra.job.name=x"), 1, 1),
        (("train.steps=3", "hydra.mode=RUN"), 1, 1),
        (("-m", "optimizer.lr=0.1,0.2"), 2, 1 + 2 * 2),  # each job for its check and by the launcher
    ],
)
def test_a_command_is_composed_once_and_is_the_same(arguments, jobs, compositions, monkeypatch, tmp_path):
    """Compared with what Hydra composes when it is asked later, having nothing kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    composing, calls, seen = config_loader_impl.create_defaults_list, [], []

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(named["config_name"])
        return composing(*given, **named)

    def job(composed: compose.Composed) -> float:
        seen.append(len(calls))
        hydra, loader = HydraConfig.get(), GlobalHydra.instance().hydra
        assert loader is not None
        overrides = [*hydra.overrides.hydra, *hydra.overrides.task]
        again = loader.config_loader.load_configuration("train", overrides, run_mode=RunMode.RUN)
        calls.pop()
        assert without_the_job(hydra) == without_the_job(again.hydra)
        with open_dict(again):
            del again["hydra"]
        assert compose.job_of(again, sys.argv[1:]) == composed
        return 0.0

    monkeypatch.setattr(config_loader_impl, "create_defaults_list", counted)
    compose.run("train", job)
    assert (len(seen), len(calls)) == (jobs, compositions)


def test_a_changed_file_is_read_again(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    for steps in (5, 7):  # texts of one length
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\ntrain: {{steps: {steps}}}\n")
        settings = [composed(f"--config-dir={tmp_path}", "experiment=mine") for _ in range(2)]
        assert [each["train"]["steps"] for each in settings] == [steps] * 2
