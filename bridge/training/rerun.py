"""megatron-core's rerun state machine: a step with a suspicious loss is computed again on the same samples.

Another result the second time means a fault that passed; the same result is looked into on other hardware, for which
the run saves, ends with exit code 75 and repeats the step when the same command is run again elsewhere. What the
machine has to remember until then lies in RUN_DIR/rerun_state.json.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import rerun_state_machine as mcore
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, RerunState, RerunStateMachine

from bridge import parallel, platform
from bridge.config.run_config import RunConfig
from bridge.files import write_json
from bridge.platform.random_state import set_tracker_state, tracker_state
from bridge.runs.run_files import rank_file
from bridge.training.loss_policy import LossPolicy

STATE = "rerun_state.json"

# megatron-core's last word on a rejected result -> what the run says.
FINDINGS = {
    "first_rerun_not_reproducible": "the same computation gave a different result when repeated: a transient fault of "
    "this device; the same command resumes the run; keep an eye on the device",
    "first_rerun_reproducible": "the same computation gave the same result when repeated; run the same command on "
    "other hardware, which tells a faulty device from a real result",
    "second_rerun_not_reproducible": "another device gives a different result: a persistent fault of the device of the "
    "first run; take it out of use, then the same command resumes the run",
    "second_rerun_reproducible": "another device gives the same result: not a fault of the hardware; look at this "
    "step's data and the learning rate, or set train.nonfinite_loss or train.spiking_loss",
}


class Ending(NamedTuple):
    """The machine's wish to end the run before this step's update. save: after a checkpoint. resumable: the same
    command on other hardware finds out more."""

    save: bool
    resumable: bool
    message: str


class Rerun:
    """The state machine of this process, or nothing at all when rerun.mode is disabled."""

    def __init__(self, config: RunConfig, policy: LossPolicy, *, step: int, model: Sequence[torch.nn.Module]) -> None:
        """`step`: the last one taken. A rerun that was to happen after it on other hardware happens now."""
        self.policy, self.train = policy, config.train
        self.path = config.run_dir / STATE
        self.machine: RerunStateMachine | None = None
        self.rejected = rank_file(config.run_dir, "rejected", rank=parallel.rank())
        mcore.destroy_rerun_state_machine()
        if config.rerun.mode == "disabled":
            return
        self.rejected.parent.mkdir(parents=True, exist_ok=True)
        # Its own report of determinism fails in 0.16.1 (Caller has no filename); `statistics` is ours.
        RerunStateMachine.REPORTING_INTERVAL_ITERATIONS = sys.maxsize
        mcore.initialize_rerun_state_machine(
            mode=RerunMode(config.rerun.mode),
            state_save_func=lambda: (tracker_state(), kept_buffers(model)),  # it keeps the other generators itself
            state_restore_func=_restore,
            error_injector=mcore.RerunErrorInjector(
                config.rerun.error_injection_rate, mcore.RerunDiagnostic(config.rerun.error_injection_type)
            ),
            result_rejected_tracker_filename=str(self.rejected),
        )
        self.machine = mcore.get_rerun_state_machine()
        self._resume(step)

    def iterators(self, batches: list[Iterator[Any]]) -> list[Iterator[Any]]:
        """`batches` with the ability to give the micro-batches of a step again."""
        return batches if self.machine is None else [RerunDataIterator(iterator) for iterator in batches]

    def attempts(self, batches: list[Iterator[Any]], *, step: int) -> Iterator[None]:
        """Once per computation of `step`'s gradients: call `validate` in the body, and `ending` after the loop."""
        if self.machine is None:
            yield
            return
        if self.machine.state == RerunState.NOT_RUNNING_YET:
            self.machine.current_iteration = step - 1  # it counts on; its messages then name the step
        while self.machine.should_run_forward_backward(batches):
            yield

    def validate(self, loss: torch.Tensor) -> None:
        """Show the machine this rank's own loss, not the mean over all ranks: the faulty rank is to be found.

        loss: [sum of token losses, number of tokens]. Waits for the device.
        """
        if self.machine is None or not parallel.is_pipeline_last_stage():
            return
        mean = loss[0] / loss[1].clamp(min=1)
        self.machine.validate_result(
            mean,
            rejection_func=lambda value: not math.isfinite(value),
            message="loss is not finite",
            fatal=self.train.nonfinite_loss == "error",
        )
        self.machine.validate_result(
            mean,
            rejection_func=lambda value: self.policy.is_spike(float(value)),
            message="loss spikes",
            fatal=self.train.spiking_loss == "error",
        )

    def ending(self, *, step: int) -> Ending | None:
        """Whether the run is to end before the update of `step`. A collective call when it is."""
        if self.machine is None:
            return None
        save, leave, code = self.machine.should_checkpoint_and_exit()
        if not leave:
            return None
        resumable = code == mcore.EXIT_CODE_RESUME_TO_DISAMBIGUATE
        return Ending(save, resumable, f"step {step}: {self._finding()}")

    def leave(self, ending: Ending, *, step: int) -> None:
        """Put on file what a process that resumes after `step` has to know, or nothing after the machine's last word.

        A collective call, after the checkpoint."""
        assert self.machine is not None
        if ending.resumable and ending.save:
            ranks = parallel.all_gather(_plain(self.machine))
            common = {"step": step, "mode": self.machine.mode.value, "state": self.machine.state.value}
            if parallel.is_main():
                write_json({**common, "ranks": ranks}, self.path)
        elif not ending.resumable and parallel.is_main():
            self.path.unlink(missing_ok=True)

    def statistics(self) -> str | None:
        """With report_determinism_stats: how much two computations of one step differed so far. A collective call."""
        if self.machine is None or self.machine.mode != RerunMode.REPORT_DETERMINISM_STATS:
            return None
        first, *others = [
            stats for rank in parallel.all_gather(list(self.machine.stats.values())) for stats in rank[:1]
        ]
        first.combine(others)
        return f"every step computed twice: {first.print_stats()}"

    def _finding(self) -> str:
        """What the first of the ranks with a rejected result found, in one line."""
        assert self.machine is not None
        mine = None
        if self.machine.rerun_requested:
            (*_, last) = re.finditer(r"status=(\S+) result=(\S+) message='(.*)'", self.rejected.read_text())
            status = last[1].rpartition(".")[2].lower()
            mine = (
                f"{last[3]} on rank {parallel.rank()} ({os.uname().nodename}, {platform.device()}); {FINDINGS[status]}"
            )
        return next(found for found in parallel.all_gather(mine) if found is not None)

    def _resume(self, step: int) -> None:
        """Take up a rerun that an earlier process left to this one."""
        assert self.machine is not None
        kept = json.loads(self.path.read_text()) if self.path.is_file() else None
        if kept is None or kept["step"] != step or step + 1 in self.train.iterations_to_skip:
            return
        if len(kept["ranks"]) != parallel.size():
            if parallel.is_main():
                print(
                    f"{self.path} is from {len(kept['ranks'])} processes: step {step + 1} is not rerun for comparison"
                )
            return
        self.machine.load_state_dict(
            {
                "mode": RerunMode(kept["mode"]),
                "state": RerunState(kept["state"]),
                "current_iteration": step + 1,
                "sharded": _unpacked(kept["ranks"][parallel.rank()]),
            }
        )


def _restore(state: tuple[dict[str, torch.Tensor], Callable[[], None]]) -> None:
    generators, put_back = state
    set_tracker_state(generators)
    put_back()


def kept_buffers(model: Sequence[torch.nn.Module]) -> Callable[[], None]:
    """Copy the buffers of `model`, in which routers of experts count tokens and keep their biases: both change before
    the update. What is returned puts them back."""
    kept = [(buffer, buffer.clone()) for chunk in model for _, buffer in chunk.named_buffers()]

    def put_back() -> None:
        for buffer, before in kept:
            buffer.copy_(before)

    return put_back


def _plain(machine: RerunStateMachine) -> dict[str, Any]:
    """This rank's part of the machine's state_dict, as JSON can hold it."""
    state = dict(machine.state_dict(None, "torch_dist")["sharded"].data)
    call, result, injector = (
        state[key] for key in ("failed_validation_call", "initial_result", "error_injector_checkpoint")
    )
    device = state["suspicious_device"]
    return state | {
        "failed_validation_call": None if call is None else [*call.caller, call.sequence],
        "initial_result": None if result is None else repr(float(result)),
        "suspicious_device": device if device is None or isinstance(device, int) else str(device),
        "error_injector_checkpoint": {
            key: value.value if isinstance(value, mcore.RerunDiagnostic) else value for key, value in injector.items()
        },
    }


def _unpacked(plain: dict[str, Any]) -> dict[str, Any]:
    """What `_plain` made JSON of."""
    call, result, injector = (
        plain[key] for key in ("failed_validation_call", "initial_result", "error_injector_checkpoint")
    )
    device = plain["suspicious_device"]
    return plain | {
        "failed_validation_call": call and mcore.Call(mcore.Caller(*call[:2]), call[2]),
        "initial_result": result and torch.tensor(float(result), dtype=torch.float64),
        "suspicious_device": torch.device(device) if isinstance(device, str) else device,
        "error_injector_checkpoint": {
            key: mcore.RerunDiagnostic(value) if isinstance(value, str) else value for key, value in injector.items()
        },
    }
