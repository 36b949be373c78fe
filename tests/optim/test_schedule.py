"""Learning rates and weight decays step by step, against formulas written out here."""

import math
from types import SimpleNamespace

import pytest

from bridge.config.schema import Scheduler
from bridge.errors import ConfigError
from bridge.optim import schedule

FIELDS = {"lr": 1.0, "min_lr": 0.1, "weight_decay": 0.2}
STEPS, WARMUP = 20, 4


def rates(scheduler: Scheduler, *, steps: int = STEPS) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of steps 0 .. steps - 1."""
    optimizer = SimpleNamespace(param_groups=[{"default_config": True}])
    built = schedule.build(scheduler, optimizer=optimizer, fields=FIELDS, steps=steps)
    seen = []
    for _ in range(steps):
        seen.append((schedule.learning_rate(optimizer), optimizer.param_groups[0]["weight_decay"]))
        built.step(1)
    return seen


def after_warmup(step: int, style: str) -> float:
    done = (step - WARMUP) / (STEPS - WARMUP)
    return {
        "constant": 1.0,
        "linear": 0.1 + 0.9 * (1 - done),
        "cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)),
        "inverse-square-root": max(0.1, math.sqrt(WARMUP / step)) if step else 0.0,
        "WSD": 1.0 if step <= STEPS - 5 else 0.1 + 0.9 * (1 - (step - STEPS + 5) / 5),
    }[style]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_learning_rate_of_every_step(style: str) -> None:
    scheduler = Scheduler(lr_decay_style=style, lr_warmup_steps=WARMUP, wsd_decay_steps=5, lr_wsd_decay_style="linear")
    expected = [step / WARMUP if step <= WARMUP else after_warmup(step, style) for step in range(STEPS)]
    assert [rate for rate, _ in rates(scheduler)] == pytest.approx(expected)


def test_weight_decay_grows_from_start_to_end() -> None:
    scheduler = Scheduler(start_weight_decay=0.0, end_weight_decay=0.4, weight_decay_incr_style="linear")
    assert [decay for _, decay in rates(scheduler)] == pytest.approx([0.4 * step / STEPS for step in range(STEPS)])
    assert {decay for _, decay in rates(Scheduler())} == {0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warmup_init": 2.0, "lr_warmup_steps": 2}, "scheduler.lr_warmup_init: 2.0 is above"),
        ({"start_weight_decay": 0.5}, "scheduler.start_weight_decay: 0.5 is above"),
        ({"end_weight_decay": 0.5}, "scheduler.weight_decay_incr_style: constant cannot go"),
        ({"lr_decay_style": "WSD", "wsd_decay_steps": 50}, "scheduler.wsd_decay_steps: 50 is more"),
    ],
)
def test_impossible_schedules_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rates(Scheduler(**options))
