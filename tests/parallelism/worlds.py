"""Many short training runs in one set of processes, which start once, and what is compared between them."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from bridge.weights import locate
from bridge.weights.dist_files import open_dist
from tests.distributed import run_distributed
from tests.training.runs import Ran, config, losses, train

STEPS = 3
TIMEOUT = 400.0  # seconds for all runs of a world; they take about twenty, more on a busy machine
PARALLELISM = Path(__file__).resolve().parents[2] / "conf" / "parallelism"


class Case(NamedTuple):
    """A model on so many processes. options: sections that differ from the reference's, `parallelism` above all."""

    model: str
    ranks: int
    options: Mapping[str, Mapping[str, Any]]


def option(name: str, **overrides: Any) -> dict[str, Any]:
    """The keys of `parallelism=name` and overrides, as the `parallelism` section has them."""
    return {**yaml.safe_load((PARALLELISM / f"{name}.yaml").read_text()), **overrides}


def train_all(runs: Mapping[str, Any]) -> dict[str, Ran]:
    """Train each of `runs` in this world, one after the other. Every one makes its own model-parallel groups."""
    from bridge import parallel
    from bridge.platform import prepare

    prepare()
    whole = parallel.teardown
    parallel.teardown = functools.partial(whole, keep_world=True)
    torch.distributed.init_process_group("gloo")
    results = {}
    for name, run in runs.items():
        print(f"--- {name}", flush=True)
        results[name] = train(run)
    return results


def _train_in_world(ranks: int, runs: Mapping[str, Any]) -> dict[str, Ran]:
    results: dict[str, Ran] = run_distributed(train_all, ranks, runs, timeout=TIMEOUT)[0]
    return results


class Trained:
    """The runs of `cases`, trained when one of them is asked for: all of one model and number of processes at once.

    Every run draws its weights from the seed, so what a layout makes of the seed is compared as well.
    """

    def __init__(self, folder: Path, models: Mapping[str, dict[str, Any]], cases: Mapping[str, Case]) -> None:
        self.folder, self.models, self.cases = folder, models, cases
        self.results: dict[str, Ran] = {}
        self.results |= _train_in_world(1, {name: self.run_of(name, Case(name, 1, {})) for name in models})

    def run_of(self, name: str, case: Case | None = None) -> Any:
        """The configuration of a case, by default the one of that name."""
        case = case or self.cases[name]
        experts = self.models[case.model].get("num_moe_experts") is not None
        common: dict[str, Any] = {
            # Samples mask different shares of their tokens, so that a mean of means goes wrong.
            "data": {"source": "tests.training.masked", "sequence_length": 16, "vocab_size": 100, "num_samples": 50},
            "train": {"steps": STEPS, "eval_interval": None, "global_batch_size": 2 if experts else 4},
            "scheduler": {"lr_warmup_steps": 2},
            "objective": {"name": "tests.training.probability"},
        }
        sections = common.keys() | case.options.keys()
        merged = {key: {**common.get(key, {}), **case.options.get(key, {})} for key in sections}
        return config(self.folder, name=name, whole_model=self.models[case.model], **merged)

    def result(self, name: str) -> Ran:
        """What rank 0 saw of a case."""
        if name not in self.results:
            model, ranks, _ = self.cases[name]
            together = [other for other, case in self.cases.items() if case[:2] == (model, ranks)]
            self.results |= _train_in_world(ranks, {other: self.run_of(other) for other in together})
        return self.results[name]

    def by_itself(self, name: str, case: Case) -> Ran:
        """A case in processes of its own, which one that goes wrong cannot spoil for others."""
        return _train_in_world(case.ranks, {name: self.run_of(name, case)})[name]

    def assert_as_alone(self, name: str, *, rel: float) -> None:
        """Loss and gradient norm of every step, evaluation loss and saved weights are those of one process."""
        model = self.cases[name].model
        ours, alone = self.result(name), self.results[model]
        assert len(losses(alone.lines)) == STEPS
        assert losses(ours.lines) == pytest.approx(losses(alone.lines), rel=rel)
        assert norms(ours) == pytest.approx(norms(alone), rel=rel)
        for now, then in zip(own_numbers(ours), own_numbers(alone), strict=True):
            assert now == pytest.approx(then, rel=rel)
        assert ours.eval_loss == pytest.approx(alone.eval_loss, rel=rel)
        saved, expected = saved_weights(self.folder / name), saved_weights(self.folder / model)
        assert saved.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(saved[key], weight, atol=1e-4, rtol=1e-4, msg=lambda m, key=key: f"{key} {m}")


def norms(ran: Ran) -> list[float]:
    """Gradient norms by step."""
    return [line["grad_norm"] for line in ran.lines if "loss" in line]


def own_numbers(ran: Ran) -> list[dict[str, float]]:
    """What the objective and the model measure of themselves, of each step and the last evaluation: a number of the
    objective's own, balancing and prediction losses, tokens per expert."""
    names = re.compile(r"(eval_)?probability|.*load_balancing_loss|z_loss|mtp_\d_loss|tokens_per_expert_.*")
    lines = [line for line in ran.lines if "loss" in line] + [line for line in ran.lines if "eval_loss" in line][-1:]
    return [{name: line[name] for name in line if names.fullmatch(name)} for line in lines]


def saved_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The model of a run's last checkpoint."""
    dist = open_dist(locate.locate(run_dir).directory)
    return {key: dist.read(key).clone() for key in dist.tensors if not key.startswith("optimizer.")}
