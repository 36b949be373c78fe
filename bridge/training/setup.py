"""From a configuration to everything a step needs: model -> weights -> DDP -> optimizer -> data -> resume."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config, unwrap_model

from bridge import checkpoint, parallel
from bridge.checkpoint import Position, Trainable
from bridge.config import modules, run_config, sections
from bridge.config.layout.rows import row_length_may_vary
from bridge.config.routing import Routed
from bridge.config.run_config import RunConfig
from bridge.data import source
from bridge.data.samples.rows import Pad
from bridge.data.source import Datasets, Prepared
from bridge.errors import ConfigError
from bridge.models import ddp, gpt
from bridge.objectives import objective as objectives
from bridge.objectives.objective import Objective
from bridge.optim import optimizer as optimizers
from bridge.optim import schedule
from bridge.platform import user_buffers
from bridge.runs import run_files
from bridge.training import batches, best, initial, metrics, settings
from bridge.training.evaluate import metrics_of, sets
from bridge.training.length import Length
from bridge.training.length import of as length_of


@dataclass(frozen=True)
class Data:
    """The data source of a run, prepared."""

    source: Any
    options: Any
    prepared: Prepared

    def build(self, *, seed: int) -> Datasets:
        """The datasets; called once process groups exist."""
        datasets: Datasets = self.source.build(self.options, self.prepared, seed=seed)
        return datasets


@dataclass(frozen=True)
class Job:
    """A run that is ready to take its next step. config: with train.steps, also of train.epochs. valid: the sets held
    out, by name (bridge.training.evaluate.sets). progress: where it stands, 0 or the checkpoint's."""

    config: RunConfig
    objective: Objective
    state: Trainable
    data: Data
    datasets: Datasets
    valid: dict[str, Any]
    progress: Position
    length: Length

    @property
    def checkpoints(self) -> Path:
        return self.config.run_dir / run_files.CHECKPOINTS

    @property
    def transformer(self) -> TransformerConfig:
        config: TransformerConfig = get_model_config(self.state.model[0])
        return config


def prepare_data(config: RunConfig) -> Data:
    """Tokenised data on this node's disk. Runs before process groups exist: no rank times out while another works."""
    data = read_data(config)
    _check_vocabulary(data.prepared.vocab_size, config)
    return data


def read_data(config: RunConfig) -> Data:
    """The same, whatever the model."""
    module = modules.load("data.source", config.data["source"], "data")
    options = sections.build(module.Config, config.data, "data")
    cache = source.cache_root(options.cache_dir)
    prepared = module.prepare(options, cache=cache, seed=config.train.seed)
    return Data(module, options, prepared)


def _check_vocabulary(made: int, config: RunConfig) -> None:
    known, tokenizer = config.model["vocab_size"], config.data.get("tokenizer")
    if made <= known:
        return
    if tokenizer is not None:
        raise ConfigError(
            f"data.tokenizer: {tokenizer} has {made} token ids, more than model.vocab_size={known}; set the model's "
            f"own tokenizer, or for a new model model.vocab_size={made}"
        )
    raise ConfigError(
        f"model.vocab_size: {known} is smaller than the {made} token ids of the data; "
        f"set model.vocab_size={made} or more"
    )


def join(config: RunConfig) -> None:
    """`parallel.join`, and the buffers of communication that overlaps with computation."""
    routed = config.routed
    parallel.join(routed, seed=config.train.seed)
    if routed.get("tp_comm_overlap"):
        sequences = config.train.sequences_per_pass(parallel.size("dp"))
        num_tokens = sequences * config.data["sequence_length"] // parallel.size("cp")
        user_buffers.create(routed.transformer, num_tokens=num_tokens)


def build_model(config: RunConfig, *, routed: Routed) -> list[Any]:
    """The model chunks of this rank with the weights of init.path, or random ones, and prints which."""
    seed = config.train.seed if config.init.path is None else None
    chunks: list[Any] = gpt.build(routed, wrap=True, seed=seed)
    initial.load(unwrap_model(chunks), routed=routed, path=config.init.path)
    tokenizer = config.data.get("tokenizer")
    if tokenizer is not None and parallel.is_main():
        print(f"tokenizer: {tokenizer}", flush=True)
    return chunks


def build_datasets(config: RunConfig, data: Data) -> Datasets:
    """The datasets of `data`; padded rows end with the longest of their micro-batch, where the layout allows it."""
    datasets = data.build(seed=config.train.seed)
    if row_length_may_vary(config.routed):
        for dataset in (datasets.train, *sets(datasets.valid).values()):
            if isinstance(collate := getattr(dataset, "collate", None), Pad):
                collate.longest = True
    return datasets


def build(config: RunConfig, data: Data) -> Job:
    """Model, optimizer, schedule and datasets, standing at the run's latest checkpoint if it has one.

    Process groups must exist (`bridge.parallel.initialize`).
    """
    routed = per_token_loss(config.routed)
    root = config.run_dir / run_files.CHECKPOINTS
    resuming = checkpoint.has_checkpoint(root)
    chunks = gpt.build(routed, wrap=True, seed=None) if resuming else build_model(config, routed=routed)
    model = ddp.wrap(chunks, DistributedDataParallelConfig(**routed.ddp))
    optimizer = optimizers.build(routed, model=model)
    datasets = build_datasets(config, data)
    valid = sets(datasets.valid)
    standing = checkpoint.stands_at(root) if config.train.epochs is not None else Position()
    config, length = _with_steps(config, datasets, standing)
    scheduler = schedule.build(
        config.scheduler, optimizer=optimizer, fields=routed.optimizer, steps=config.train.num_steps
    )
    _connect(model, optimizer)
    settings.check(routed, model=model, optimizer=optimizer)
    state = Trainable(model, optimizer, scheduler)
    if datasets.valid is None and parallel.is_main():
        print("evaluation: none, as the data holds nothing out (data.split)", flush=True)
    identity = "-".join(filter(None, [data.prepared.identity, getattr(datasets.train, "identity", "")]))
    progress = Position(data=identity)
    if resuming:

        def reseed(step: int) -> None:
            parallel.seed_generators(routed.transformer, seed=config.train.seed + step, keep_tracker=True)

        latest, progress = checkpoint.resume(root, state, config.checkpoint, reseed=reseed)
    if progress.data != identity:
        raise ConfigError(
            f"data.source: the prepared data is {identity}, but this run has read {progress.data} so far (its text, "
            "tokenizer, split or packing changed; packed rows are others with another context_parallel_size); set "
            "another name="
        )
    if resuming and parallel.is_main():
        print(f"resumed from {latest.directory} at step {progress.step}", flush=True)
        config, length = _with_steps(config, datasets, progress)  # it may have fallen back to an older one
    if config.train.epochs is not None and parallel.is_main():
        print(length.described(config.train.epochs), flush=True)
    objective = objectives.build(config.objective)
    metrics.check_names(objective, get_model_config(model[0]))
    best.check(config, metrics_of(objective, valid) if datasets.valid is not None else ())
    return Job(config, objective, state, data, datasets, valid=valid, progress=progress, length=length)


def _with_steps(config: RunConfig, datasets: Datasets, progress: Position) -> tuple[RunConfig, Length]:
    """`config` with the steps that the run has, and its length; both the same on every rank."""
    train, num_ranks = config.train, parallel.size("dp")
    found = length_of(
        train,
        num_samples=len(datasets.train),
        batch_size_at=batches.batch_size_at(train, data_parallel_size=num_ranks),
        progress=progress,
    )
    resolved = replace(config, train=replace(train, steps=found.steps))
    if train.epochs is not None:
        run_config.check_schedule(resolved)
    return resolved, found


def per_token_loss(routed: Routed) -> Routed:
    """`routed` with the only loss reduction there is: one division by the number of tokens of the global batch.

    Raises ConfigError when the user asked for another; it would make the loss depend on the layout.
    """
    if routed.given.get("calculate_per_token_loss") is False:
        key = routed.key("calculate_per_token_loss")
        raise ConfigError(f"{key}: false would make the loss depend on the micro-batch split; set true or leave it out")
    return replace(routed, transformer={**routed.transformer, "calculate_per_token_loss": True})


def _connect(model: list[Any], optimizer: Any) -> None:
    """Tell megatron-core's schedule how to scale the loss, when to reduce gradients and how to finish them."""
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    overlaps = model[0].ddp_config
    if overlaps.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in model])
    if overlaps.overlap_param_gather and overlaps.align_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in model])


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions
