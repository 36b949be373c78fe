"""One training process from its configuration to its outcome."""

import time

# ruff: noqa: E402
from bridge import platform

platform.prepare()  # before megatron-core is imported: on CPU, importing it first costs seconds of compilation

from bridge import parallel
from bridge.config.run_config import RunConfig
from bridge.data.source import Prepared
from bridge.platform import user_buffers
from bridge.training import metrics, setup
from bridge.training.loop import Outcome, train
from bridge.training.metrics import Report
from bridge.training.pulse import Pulse
from bridge.training.saves import Saves
from bridge.training.stop import Stop

__all__ = ["Outcome", "run"]


def run(config: RunConfig, *, started: float | None = None, pulse: Pulse | None = None) -> Outcome:
    """Train as `config` says, in this process, as the rank that RANK and WORLD_SIZE name (none: a world of one).

    Resumes from the run directory's latest checkpoint. `started`: the time.monotonic() from which train.exit_after
    counts, now unless given. `pulse` tells another thread where the run is. Raises ConfigError for what only now turns
    out to be wrong with the configuration, what `bridge.training.loop.train` raises, RunError when a checkpoint could
    not be saved, Stopped when a signal asks to stop while data is prepared.
    """
    stop = Stop(config.train, started=time.monotonic() if started is None else started)
    with stop.listening():
        metrics.check_packages(config)
        with stop.leaving_at_once():
            data = setup.prepare_data(config)
        join(config)
        outcome, saves = _train(config, data, stop, pulse or Pulse())
        # Not after a failure: the peers of a failed rank may never come to a teardown that waits for them.
        parallel.teardown()
        saves.end_exports(done=outcome.status == "done")
    return outcome


def join(config: RunConfig) -> None:
    """Make the process groups that `config` asks for. Raises ConfigError for what this platform cannot do."""
    routed = config.routed()
    platform.check(routed.transformer | routed.ddp | routed.optimizer, routed.origin)
    instances = routed.ddp.get("num_distributed_optimizer_instances", 1)
    parallel.initialize(routed.transformer, seed=config.train.seed, num_distributed_optimizer_instances=instances)
    if routed.transformer.get("tp_comm_overlap"):
        sequences = config.train.sequences_per_pass(parallel.data_parallel_size())
        num_tokens = sequences * config.data["sequence_length"] // parallel.context_parallel_size()
        user_buffers.create(routed.transformer, num_tokens=num_tokens)


def _train(config: RunConfig, data: setup.Data, stop: Stop, pulse: Pulse) -> tuple[Outcome, Saves]:
    job = setup.build(config, data)
    report = Report(config, resumed_step=job.progress.step, is_main=parallel.is_main())
    saves = Saves(job, report)
    with saves.finished():
        outcome = train(job, stop=stop, report=report, pulse=pulse, saves=saves)
    report.close()
    if parallel.is_main():
        _say_what_next(config, outcome, data.prepared)
    return outcome, saves


def _say_what_next(config: RunConfig, outcome: Outcome, prepared: Prepared) -> None:
    if outcome.status == "stopped":
        going_on = "resumes" if outcome.step else "begins again"
        print(f"stopped at step {outcome.step} ({outcome.reason}); the same command {going_on}", flush=True)
        return
    if outcome.eval_loss is not None:
        print(f"final eval loss: {outcome.eval_loss:.4f} nats per token", flush=True)
    if prepared.unigram_entropy is not None:
        print(f"unigram entropy of the held-out part: {prepared.unigram_entropy:.4f} nats per token", flush=True)
    print(
        "next:\n"
        f"  python convert.py mode=export megatron={config.run_dir} hf={config.run_dir}/export\n"
        f"  python -m bridge.generate path={config.run_dir} prompt='def '",
        flush=True,
    )
