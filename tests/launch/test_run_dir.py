"""Who may use a run directory, and with which configuration."""

import dataclasses
import os

import pytest
import yaml

from bridge.config import run_config
from bridge.errors import ConfigError
from bridge.runs.claim import claimed
from tests.training import runs


def with_checkpoint(config, *, overrides=(), swept=None):
    """Claim once and leave a checkpoint of step 5 behind."""
    with claimed(config, overrides=list(overrides), swept=swept) as claim:
        latest = claim.path / "checkpoints" / "latest_checkpointed_iteration.txt"
        latest.parent.mkdir()
        latest.write_text("5")


def test_files_of_a_claim(tmp_path):
    config = runs.config(tmp_path)
    with claimed(config, overrides=["train.steps=3", "+model.x=1"]) as claim:
        assert claim.path == config.run_dir
        assert claim.resumed_step is None
        assert run_config.read(claim.path / "config.yaml") == config
        assert yaml.safe_load((claim.path / "overrides.yaml").read_text()) == ["train.steps=3", "+model.x=1"]


def refusal(config, *, overrides=(), swept=None) -> str:
    with pytest.raises(ConfigError) as caught, claimed(config, overrides=list(overrides), swept=swept):
        pass
    return str(caught.value)


def test_a_second_claim_names_the_holder(tmp_path):
    config = runs.config(tmp_path)
    with claimed(config, overrides=[]):
        assert f"in use by process {os.getpid()} on " in refusal(config)
    with claimed(config, overrides=[]):  # free again
        pass


def test_before_a_checkpoint_everything_may_change(tmp_path):
    with claimed(runs.config(tmp_path), overrides=[]):
        pass
    with claimed(runs.config(tmp_path, model={"num_layers": 3}), overrides=[]):
        pass


def test_after_a_checkpoint_the_run_may_change_but_not_what_it_trains(tmp_path):
    with_checkpoint(runs.config(tmp_path))
    changed = runs.config(
        tmp_path,
        optimizer={"lr": 0.5},
        parallelism={"tensor_model_parallel_size": 2},
        train={"steps": 50, "global_batch_size": 8, "num_devices": 2},
        data={"num_workers": 1, "cache_dir": "/elsewhere"},
        log={"log_interval": 7},
    )
    with claimed(changed, overrides=[]) as claim:
        assert claim.resumed_step == 5


def test_all_differing_keys_are_named_and_nothing_is_overwritten(tmp_path):
    before = runs.config(tmp_path)
    with_checkpoint(before, overrides=["a=1"])
    layers = before.model["num_layers"]
    after = runs.config(
        tmp_path,
        model={"num_layers": layers + 1, "qk_layernorm": True},
        optimizer={"optimizer": "sgd"},
        precision={"params_dtype": "bf16", "pipeline_dtype": "bf16", "bf16": True},
        train={"seed": 99},
    )
    message = refusal(after)
    assert f"model.num_layers {layers} -> {layers + 1}" in message
    assert "model.qk_layernorm (not set) -> true" in message
    assert "optimizer.optimizer adam -> sgd" in message
    assert "precision.bf16 null -> true" in message
    assert f"train.seed {before.train.seed} -> 99" in message
    assert "another name=" in message and "init.path" not in message  # those weights would not fit
    assert run_config.read(before.run_dir / "config.yaml") == before
    assert yaml.safe_load((before.run_dir / "overrides.yaml").read_text()) == ["a=1"]
    with claimed(before, overrides=[]):  # the refusal gave the lock back
        pass


def test_other_data_goes_on_from_the_weights_under_another_name(tmp_path):
    config = runs.config(tmp_path)
    with_checkpoint(config)
    other = runs.config(tmp_path, data={"sequence_length": 8})
    assert f"another name= (with init.path={config.run_dir} it starts from these weights)" in refusal(other)


def test_fewer_steps_than_are_done(tmp_path):
    with_checkpoint(runs.config(tmp_path))
    assert refusal(runs.config(tmp_path, train={"steps": 4}, scheduler={"lr_warmup_steps": 0})) == (
        f"train.steps: 4, but {tmp_path / 'run'} has already done 5; set more than 5 to continue, or another "
        "name= to train again from the start"
    )
    with claimed(runs.config(tmp_path, train={"steps": 5}), overrides=[]):  # nothing left to do
        pass


def test_another_sweep_does_not_resume_this_ones_jobs(tmp_path):
    config = runs.config(tmp_path)
    with_checkpoint(config, overrides=["optimizer.lr=0.1", "name=s"], swept=["optimizer.lr=0.1"])
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=70))
    with claimed(longer, overrides=["optimizer.lr=0.1", "name=s", "train.steps=70"], swept=["optimizer.lr=0.1"]):
        pass
    for overrides, swept in [
        (["optimizer.lr=0.2", "name=s"], ["optimizer.lr=0.2"]),
        (["optimizer.lr=0.2", "name=s"], []),  # -m with one value: nothing varies
        (["train.global_batch_size=8", "name=s"], ["train.global_batch_size=8"]),
    ]:
        assert "give this sweep another name=" in refusal(config, overrides=overrides, swept=swept)
