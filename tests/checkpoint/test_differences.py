"""What a checkpoint lacks, has too much or says differently is named; what does not matter is passed over."""

import argparse
import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.weights.locate import locate
from tests.distributed import run_distributed
from tests.training.runs import EXPERTS as SMALL_EXPERTS
from tests.training.runs import config, losses, train

EXPERTS = {**SMALL_EXPERTS, "num_layers": 2}
STOP = {"steps": 8, "exit_interval": 2, "eval_interval": None}


def printed(run: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        train(run)
    return text.getvalue()


def refusal(run: Any) -> str:
    from bridge.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        train(run)
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, with experts and a bias that balances them, on two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    parallelism = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}
    run_distributed(train, 2, config(folder, whole_model=EXPERTS, parallelism=parallelism, train=STOP))
    return folder


def test_layout_and_settings_are_recorded_and_changes_said_once(saved: Path, tmp_path: Path):
    common = torch.load(locate(saved / "run").directory / "common.pt", weights_only=True)
    assert common["layout"] == {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "data_parallel_size": 2,
        "use_distributed_optimizer": True,
        "params_dtype": "float32",
    }
    shutil.copytree(saved / "run", tmp_path / "run")
    changed = {"train": {**STOP, "steps": 10}, "optimizer": {"lr": 5e-3, "adam_beta2": 0.9}}
    run = config(tmp_path, whole_model=EXPERTS, **changed)
    first, second = (run_distributed(printed, 1, run)[0] for _ in range(2))
    (line,) = [line for line in first.splitlines() if line.startswith("layout since")]
    assert "expert_model_parallel_size 2 -> 1, data_parallel_size 2 -> 1, use_distributed_optimizer true -> " in line
    (line,) = [line for line in first.splitlines() if line.startswith("settings since")]
    expected = "optimizer.lr 0.01 -> 0.005, optimizer.adam_beta2 0.95 -> 0.9, scheduler.lr_decay_steps 8 -> 10; "
    assert line == f"settings since the checkpoint: {expected}the new ones apply"
    assert "since the checkpoint" not in second


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        (
            {"moe_router_enable_expert_bias": False, "moe_router_bias_update_rate": None},
            {},
            r"different model: it has 1 buffer \(decoder.layers.1.mlp.router.expert_bias\) that this run does not",
        ),
        (
            {"qk_layernorm": True},
            {},
            r"it lacks 4 weights \(.*q_layernorm.weight.*\), 8 optimizer tensors \(optimizer.state.exp_avg.*\) of",
        ),
        (
            {"num_layers": 1, "moe_layer_freq": [0]},
            {},
            r"it has 9 weights \(decoder.layers.1..* and 6 more tensors\), 1 buffer \(.*\), 18 optim",
        ),
        (
            {},
            {"optimizer": "sgd"},
            r"different optimizer: it lacks 18 optimizer tensors \(optimizer.state.momentum_buffer.*; it has "
            r"36 optimizer tensors \(optimizer.state.exp_avg.*init.path=.*iter_0000002 and another name=",
        ),
    ],
    ids=["buffer", "missing_weight", "unexpected_weight", "optimizer"],
)
def test_differences_are_named_by_class(saved: Path, model: Any, optimizer: Any, message: str):
    whole_model = {name: value for name, value in {**EXPERTS, **model}.items() if value is not None}
    run = config(saved, whole_model=whole_model, optimizer=optimizer, train=STOP)
    (text,) = run_distributed(refusal, 1, run)
    assert re.search(message, text), text


def train_with_extra_state(run: Any) -> Any:
    """As with Transformer Engine, whose modules have a state of their own."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from bridge.checkpoint import content

    original = content.weights

    def weights(model: Any) -> dict[str, Any]:
        key = "decoder.layers.0.mlp.linear_fc1._extra_state"
        sharded = original(model)
        sharded["model0"][key] = ShardedObject(key, io.BytesIO(b"scales"), (1,), (0,))
        return sharded

    content.weights = weights
    return train(run)


def test_the_kernels_extra_state_is_never_missed(tmp_path: Path):
    run = config(tmp_path, train=STOP)
    run_distributed(train, 1, run)
    run_distributed(train_with_extra_state, 1, run)  # not in the file
    run_distributed(train, 1, run)  # in the file only
    last = run_distributed(train, 1, run)[0]
    straight = run_distributed(train, 1, config(tmp_path, name="straight", train={"steps": 8, "eval_interval": None}))
    assert losses(last.lines) == losses(straight[0].lines)


def save_as_megatron_lm_does(run: Any, directory: Path) -> None:
    """With the optimizer state in the format that megatron-core's own scripts write unless told otherwise."""
    from megatron.core import dist_checkpointing

    from bridge import parallel
    from bridge.checkpoint import content
    from bridge.training import setup

    data = setup.prepare_data(run)
    parallel.initialize(run.routed.transformer, seed=run.train.seed)
    state, metadata = (
        setup.build(run, data).state,
        {**content.METADATA, "distrib_optim_sharding_type": "dp_reshardable"},
    )
    if parallel.is_main():
        directory.mkdir(parents=True)
        (directory.parent / "latest_checkpointed_iteration.txt").write_text("2")
    parallel.barrier()
    for part in state.optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    weights = content.weights(state.model)
    optimizer = state.optimizer.sharded_state_dict(weights, metadata=metadata)
    sizes = {name: size for name, size in content.layout(state).items() if name.endswith("_size")}
    args = argparse.Namespace(**sizes, iteration=2)
    state_dict = {**weights, "optimizer": optimizer, "args": args, "checkpoint_version": 3.0}
    dist_checkpointing.save(state_dict, str(directory), content_metadata=metadata)


def test_a_format_bound_to_its_layout_is_refused(tmp_path: Path):
    directory = tmp_path / "run" / "checkpoints" / "iter_0000002"
    parallelism = {"use_distributed_optimizer": True}
    run = config(tmp_path, train=STOP, parallelism=parallelism)
    run_distributed(save_as_megatron_lm_does, 2, run, directory, fresh=True)
    (text,) = run_distributed(refusal, 1, run)
    said = (
        "state in the format 'dp_reshardable', bound to the layout that wrote it (tensor_model_parallel_size=1 "
        "pipeline_model_parallel_size=1 context_parallel_size=1 data_parallel_size=2; now tensor_model_parallel_size=1 "
        "pipeline_model_parallel_size=1 context_parallel_size=1 data_parallel_size=1); save it there with "
    )
    assert said in text and f"or init.path={directory} and another name= start from its weights alone" in text
    other = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    again = config(tmp_path, name="other", train=STOP, parallelism=other, init={"path": str(directory)})
    assert run_distributed(train, 2, again)[0].step == 2


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path):
    run = config(tmp_path, train=STOP)
    run_distributed(train, 1, run)
    file = tmp_path / "run" / "checkpoints" / "iter_0000002" / "common.pt"
    torch.save(torch.load(file, weights_only=True) | {"format": None}, file)
    (text,) = run_distributed(refusal, 1, run)
    assert "is not a training checkpoint of this program (format None, not 2); init.path=" in text
