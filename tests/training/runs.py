"""Small run configurations for the tests of the training loop."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bridge.config import run_config
from bridge.config.run_config import RunConfig

MODEL = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 100,
    "max_sequence_length": 32,
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
# A dense layer and one with a shared expert and four others, which a score and a bias choose.
EXPERTS: dict[str, Any] = {
    **MODEL,
    "family": "qwen3_moe",
    "num_moe_experts": 4,
    "moe_layer_freq": [0, 1],
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_topk": 2,
    "moe_router_dtype": "fp32",
    "moe_router_score_function": "sigmoid",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
}
FP32 = {"params_dtype": "fp32", "pipeline_dtype": "fp32", "grad_reduce_in_fp32": True}
ADAM = {"optimizer": "adam", "lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "clip_grad": 1.0}


def config(runs_dir: Path, *, whole_model: dict[str, Any] | None = None, **overrides: Any) -> RunConfig:
    """A two-layer Llama on random tokens, 20 steps of 4 sequences, every step reported.

    `section={"key": value}` changes keys of a section, `whole_model` replaces the model's; `name="..."` names the run.
    """
    sections: dict[str, Any] = {
        "name": "run",
        "runs_dir": str(runs_dir),
        "model": dict(whole_model or MODEL),
        "parallelism": {},
        "optimizer": dict(ADAM),
        "precision": dict(FP32),
        "peft": {"method": "none"},
        "data": {"source": "mock", "sequence_length": 16, "vocab_size": 100, "num_samples": 50},
        "objective": {"name": "next_token"},
        "scheduler": {"lr_warmup_steps": 3},
        "train": {"steps": 20, "global_batch_size": 4, "micro_batch_size": 1, "eval_interval": 10, "eval_samples": 4},
        "init": {},
        "checkpoint": {},
        "log": {"log_interval": 1},
        "rerun": {},
        "launch": {},
    }
    if overrides.get("optimizer", {}).get("optimizer") == "sgd":
        sections["optimizer"].pop("adam_beta2")
    if "source" in overrides.get("data", {}):
        sections["data"] = {"source": ""}
    for name, value in overrides.items():
        sections[name] = {**sections[name], **value} if isinstance(value, dict) else value
    return run_config.from_dict(sections)


class Ran(NamedTuple):
    """What one rank saw of a run: the outcome and the lines of metrics.jsonl, but for those about saves."""

    status: str
    step: int | None
    eval_loss: float | None
    lines: list[dict[str, Any]]


def train(run: RunConfig) -> Ran:
    """Run `run` in this process, a worker of tests.distributed or a lone one."""
    from bridge.training import metrics
    from bridge.training.run import run as run_config_here

    outcome = run_config_here(run)
    lines = [line for line in metrics.read(run.run_dir) if "saved_step" not in line]
    return Ran(outcome.status, outcome.step, outcome.eval_loss, lines)


def train_and_print(run: RunConfig) -> tuple[Ran, str]:
    """`train`, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        ran = train(run)
    return ran, output.getvalue()


def one_step(
    job: Any,
    streams: list[Any],
    *,
    micro_batch_size: int,
    num_microbatches: int,
    before_update: Callable[[], None] = lambda: None,
) -> Any:
    """The result of one training step of `job`, as the loop takes it. before_update: sees the reduced gradients."""
    from bridge.training.loss_policy import LossPolicy
    from bridge.training.rerun import Rerun
    from bridge.training.step import Shape, train_step

    policy = LossPolicy(job.config, job.progress)
    rerun = Rerun(job.config, policy, step=0, model=job.state.model)
    shape = Shape(job.data.options.sequence_length, micro_batch_size, num_microbatches)
    return train_step(
        job.objective,
        job.state,
        streams,
        shape,
        step=1,
        policy=policy,
        rerun=rerun,
        before_update=before_update,
    )


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """Training losses by step."""
    return [line["loss"] for line in lines if "loss" in line]


def sample_ids(run_dir: Path) -> list[list[int]]:
    """Ids read so far, by data-parallel rank."""
    return [
        [index for _, ids in recorded(file) for index in ids] for file in sorted((run_dir / "sample_ids").iterdir())
    ]


def recorded(file: Path) -> list[tuple[int, list[int]]]:
    """(step, ids) of every micro-batch in one file of RUN_DIR/sample_ids."""
    lines = [line.split(":") for line in file.read_text().splitlines()]
    return [(int(step), [int(word) for word in ids.split()]) for step, ids in lines]
