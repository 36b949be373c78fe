"""Many models trained for a few steps in one set of processes, and what of it is not as transformers has it."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import hf_models
from tests.hf_gradients import BALANCE
from tests.training.runs import config, one_step

LENGTH, MICRO_BATCH, NUM_MICROBATCHES = 20, 2, 2
NO_CHANCE = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "moe_input_jitter_eps": None}


class Task(NamedTuple):
    """A model to train from the weights in `directory`.

    gradients: a directory with those of the first step, in the form of the model's files. num_parameters: without
    padding of the vocabulary. balanced: with the losses that balance experts.
    """

    directory: Path
    gradients: Path
    num_parameters: int
    balanced: bool


class Seen(NamedTuple):
    """What a rank saw of a model: loss and gradient norm of each step; what is wrong; the line that refused it."""

    losses: list[float]
    norms: list[float]
    wrong: list[str]
    refused: str | None = None


def micro_batches(step: int) -> list[Tensor]:
    """Token ids of all micro-batches of a step, [sequences, length + 1] each."""
    seeds = range(step * NUM_MICROBATCHES, (step + 1) * NUM_MICROBATCHES)
    return [hf_models.prompts(batch=MICRO_BATCH, length=LENGTH + 1, seed=seed) for seed in seeds]


def train_all(
    tasks: Mapping[str, Task], parallelism: dict[str, Any], folder: Path, steps: int, tolerance: float
) -> dict[str, Seen]:
    """Each model in turn, for so many steps; gradients may be off by `tolerance` of a tensor's norm."""
    from bridge.config import layout
    from bridge.errors import ConfigError
    from bridge.training import setup

    seen = {}
    for number, (name, task) in enumerate(tasks.items()):
        print(f"--- {name}", flush=True)
        run = _config(name, task, parallelism, folder)
        if number == 0:
            setup.join(run)
        try:
            world_size = torch.distributed.get_world_size()
            layout.check(run.routed, world_size=world_size, sequence_length=LENGTH, train=run.train)
        except ConfigError as error:
            seen[name] = Seen([], [], [], str(error))
        else:
            seen[name] = _train(run, task, steps=steps, tolerance=tolerance)
    return seen


def _config(name: str, task: Task, parallelism: dict[str, Any], folder: Path) -> Any:
    from bridge.models.hf import config as hf_config

    model = hf_config.to_mcore(hf_config.read(task.directory)) | NO_CHANCE
    if model.get("num_moe_experts"):
        aux, z = BALANCE if task.balanced else (0.0, None)
        model |= {"moe_aux_loss_coeff": aux, "moe_z_loss_coeff": z, "moe_router_load_balancing_type": "aux_loss"}
    else:
        del model["moe_input_jitter_eps"]
    return config(
        folder,
        name=name,
        whole_model=model,
        parallelism=parallelism,
        data={"sequence_length": LENGTH},
        train={"global_batch_size": MICRO_BATCH * NUM_MICROBATCHES, "micro_batch_size": MICRO_BATCH},
        init={"path": str(task.directory)},
        optimizer={"lr": 1e-3},
    )


def _train(run: Any, task: Task, *, steps: int, tolerance: float) -> Seen:
    from bridge import parallel
    from bridge.objectives import passes
    from bridge.training import setup

    job = setup.build(run, setup.prepare_data(run))
    wrong = _norm_of_ones(job.state, task)
    # With the distributed optimizer a rank has the sum of a part of the gradient alone.
    has_all = not run.routed.ddp.get("use_distributed_optimizer") or parallel.size("dp_cp") == 1

    def compare() -> None:
        if has_all and not norms:
            wrong.extend(_differences(run.model, job.state.model, task, tolerance))

    norms: list[float] = []
    measured = []
    for step in range(steps):
        result = one_step(
            job,
            [_batches(step) for _ in job.state.model],
            micro_batch_size=MICRO_BATCH,
            num_microbatches=NUM_MICROBATCHES // parallel.size("dp"),
            before_update=compare,
        )
        measured.append(result.measured)
        norms.append(result.grad_norm)
    losses = [totals.numbers["loss"] for totals in passes.totals(measured)]
    return Seen(losses, norms, wrong)


def _batches(step: int) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches."""
    from bridge import parallel

    for ids in micro_batches(step)[parallel.rank("dp") :: parallel.size("dp")]:
        tokens, labels = ids[:, :-1], ids[:, 1:]
        positions = torch.arange(LENGTH).expand_as(tokens)
        yield {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(tokens.shape), "position_ids": positions}


def _norm_of_ones(state: Any, task: Task) -> list[str]:
    """A gradient of ones has the root of the number of parameters for its norm. Rows that pad the vocabulary, which the
    model has for the layout's sake, are among them; the gradient that they have in training is 0."""
    for chunk in state.model:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1.0)
    state.optimizer.prepare_grads()
    counted = state.optimizer.get_grad_norm() ** 2
    for chunk in state.model:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    expected = task.num_parameters + _num_padding(state.model)
    return [] if abs(counted / expected - 1) < 1e-6 else [f"the norm counts {counted:.1f} of {expected} parameters"]


def _num_padding(chunks: list[Any]) -> int:
    from bridge.weights import shards

    vocab_size = shards.unwrap(chunks[0]).true_vocab_size
    padded = [target.shape for target in shards.targets(chunks).values() if target.padded]
    return sum((shape[0] - vocab_size) * math.prod(shape[1:]) for shape in padded)


def _differences(model: dict[str, Any], chunks: list[Any], task: Task, tolerance: float) -> list[str]:
    """Tensors of this rank, every copy of them, whose gradient is not its part of transformers'."""
    from bridge.models import family
    from bridge.weights import shards
    from bridge.weights.hf_files import open_hf
    from bridge.weights.ledger import plan
    from bridge.weights.transfer import merge, pad_rows

    table = family.by_name(model["family"]).table(model)
    held, targets = _gradients(chunks), shards.targets(chunks)
    files, wrong = open_hf(task.gradients), []
    for move in plan(table, targets, vocab_size=model["vocab_size"]):
        if move.mcore_key not in held or move.mcore_key.endswith("expert_bias"):  # which is no parameter
            continue
        whole = pad_rows(merge(files, move), move)
        norm = whole.norm().item()
        for piece in held[move.mcore_key].pieces:
            off = (piece.data.cpu() - whole[piece.place]).norm().item()
            if not off < tolerance * norm + ROUNDING:
                wrong.append(f"{move.mcore_key}: off by {off:.1e} of {norm:.1e}")
    return wrong


ROUNDING = 1e-6  # of a gradient that is 0 in theory: a bias on keys without rotary embedding


def _gradients(chunks: list[Any]) -> Any:
    """What this rank's chunks hold, as `shards.pieces` has it, with gradients for weights."""
    from bridge.weights import shards

    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad
    try:
        return shards.pieces(chunks)
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
