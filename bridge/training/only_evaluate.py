"""eval_only: what the objective measures of a checkpoint or Hugging Face directory. No optimizer, no run."""

import json
import math
from pathlib import Path
from typing import Any

from bridge import parallel
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError, RunError
from bridge.objectives import objective as objectives
from bridge.training import batches, setup
from bridge.training.console import evaluated
from bridge.training.evaluate import UNNAMED, evaluate, sets
from bridge.training.loop import Outcome
from bridge.weights import locate


def run(config: RunConfig, data: setup.Data) -> Outcome:
    """Evaluate the model in init.path on the validation samples of `data`; print the loss and write eval_output.

    Raises ConfigError when nothing is held out for validation, RunError when eval_output cannot be written.
    """
    setup.join(config)
    valid = sets(setup.build_datasets(config, data).valid)
    if not valid:
        raise ConfigError("eval_only: true, but the data holds nothing out to evaluate on; set data.split, e.g. '95,5'")
    model = setup.build_model(config, routed=setup.per_token_loss(config.routed))
    objective = objectives.build(config.objective)
    found = evaluate(objective, model, valid, train=config.train, sequence_length=data.options.sequence_length)
    loss = found["eval_loss"]
    counts = {name: batches.num_evaluation_samples(dataset, config.train) for name, dataset in valid.items()}
    result = {
        "path": config.init.path,
        "step": _step(config.init.path),
        **found,
        "num_samples": sum(counts.values()),
        **{f"num_samples/{name}": count for name, count in counts.items() if name != UNNAMED},
        "data": config.data["source"],
    }
    if parallel.is_main():
        print(f"eval loss: {loss:.4f} nats per token over {result['num_samples']} samples", flush=True)
        for part in evaluated(found)[1:]:  # of each set that has a name
            print(part, flush=True)
        if config.eval_output is not None:
            _append(result, Path(config.eval_output))
    parallel.teardown()
    return Outcome("done", result["step"], loss)


def _step(path: str | None) -> int | None:
    """The iteration that a Megatron checkpoint is; None for a Hugging Face directory."""
    return locate.locate(path).iteration if path is not None and locate.is_megatron(path) else None


def _append(result: dict[str, Any], path: Path) -> None:
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in result.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(
            f"eval_output: {path} cannot be written ({error.strerror}); the loss is printed above"
        ) from error
    print(f"written to {path}", flush=True)
