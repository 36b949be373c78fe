"""One training process from its configuration to its outcome."""

import time

# ruff: noqa: E402
from bridge import platform

platform.prepare()  # before megatron-core is imported: on CPU, importing it first costs seconds of compilation

from bridge import parallel
from bridge.config.run_config import RunConfig
from bridge.data.source import Prepared
from bridge.models import ddp
from bridge.training import only_evaluate, setup
from bridge.training.loop import Outcome, train
from bridge.training.metrics import Report
from bridge.training.pulse import BUILDING, EVALUATING, PREPARING, Pulse
from bridge.training.saves import Saves
from bridge.training.stop import Stop

__all__ = ["Outcome", "run"]


def run(config: RunConfig, *, started: float | None = None, pulse: Pulse | None = None) -> Outcome:
    """Train (eval_only: evaluate) as `config` says, in this process, as the rank that RANK and WORLD_SIZE name.

    Without those it is a world of one. Training resumes from the run directory's latest checkpoint. `started`: the
    time.monotonic() from which train.exit_after counts, now unless given. `pulse` tells another thread where the run
    is. Raises ConfigError for what only now turns out to be wrong with the configuration, what
    `bridge.training.loop.train` raises, RunError when a checkpoint could not be saved, Stopped when a signal asks to
    stop while data is prepared.
    """
    pulse = pulse or Pulse()
    if config.eval_only:
        pulse.enter(PREPARING)
        data = setup.prepare_data(config)
        pulse.enter(EVALUATING)
        pulse.leave()  # a set of any size: nobody can say how long is too long
        return only_evaluate.run(config, data)
    stop = Stop(config.train, started=time.monotonic() if started is None else started)
    with stop.listening():
        pulse.enter(PREPARING)
        with stop.leaving_at_once():
            data = setup.prepare_data(config)
        pulse.enter(BUILDING)
        setup.join(config)
        stop.meet()
        outcome, saves = _train(config, data, stop, pulse)
        # Not after a failure: the peers of a failed rank may never come to a teardown that waits for them.
        parallel.teardown()
        saves.end_exports(done=outcome.status == "done")
    return outcome


def _train(config: RunConfig, data: setup.Data, stop: Stop, pulse: Pulse) -> tuple[Outcome, Saves]:
    job = setup.build(config, data)
    pulse.steps = job.length.steps
    report = Report(job.config, resumed_step=job.progress.step, is_main=parallel.is_main())
    saves = Saves(job, report)
    with saves.finished():
        outcome = train(job, stop=stop, report=report, pulse=pulse, saves=saves)
    pulse.leave()
    ddp.release(job.state.model)
    report.close()
    if parallel.is_main():
        kept = outcome.step if config.checkpoint.save else job.progress.step
        _say_how_it_ended(outcome, data.prepared, kept=kept)
    return outcome, saves


def _say_how_it_ended(outcome: Outcome, prepared: Prepared, *, kept: int | None) -> None:
    """kept: the step of the latest checkpoint; 0 or None without one."""
    if outcome.status == "stopped":
        going_on = "begins again" if not kept else "resumes" if kept == outcome.step else f"resumes at step {kept}"
        lost = "" if kept == outcome.step else ", not saved (checkpoint.save=false)"
        print(f"stopped at step {outcome.step} ({outcome.reason}){lost}; the same command {going_on}", flush=True)
        return
    if outcome.eval_loss is not None:
        print(f"final eval loss: {outcome.eval_loss:.4f} nats per token", flush=True)
    if prepared.unigram_entropy is not None:
        print(f"unigram entropy of the held-out part: {prepared.unigram_entropy:.4f} nats per token", flush=True)
