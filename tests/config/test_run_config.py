"""A whole configuration: closed sections, named modules, rules across sections, and the file the workers read."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bridge.config import run_config, schema
from bridge.errors import ConfigError

CONFIG: dict[str, Any] = {
    "name": "demo",
    "model": {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 4096,
        "max_sequence_length": 256,
    },
    "parallelism": {},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-5},
    "precision": {},
    "peft": {"method": "none"},
    "data": {"source": "mock", "sequence_length": 64},
    "objective": {"name": "next_token"},
    "train": {"steps": 5},
    "log": {"wandb": {"project": "p"}},
}


TEXT = {"data": {"source": "stdlib"}}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """CONFIG with values set by full key; `...` deletes."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is ...:
            del section[last]
        else:
            section[last] = value
    return config


def test_sections_become_dataclasses_with_defaults():
    run = run_config.from_dict(CONFIG)
    assert run.train == schema.Train(steps=5)
    assert run.log.wandb == schema.Wandb(project="p")
    assert run.scheduler == schema.Scheduler()
    assert run.run_dir == Path("runs/demo")
    assert run.routed.optimizer == {"lr": 1e-3, "min_lr": 1e-5}


def test_weights_that_exist_train_at_a_hundredth_of_the_rate_of_random_ones() -> None:
    changes: list[dict[str, Any]] = [{}, {"init.path": "some"}, {"init.path": "some", "optimizer.lr": 3e-4}]
    rates = [run_config.from_dict(changed({"optimizer.lr": ..., **change})).optimizer["lr"] for change in changes]
    assert rates == [1e-3, 1e-5, 3e-4]


def test_file_gives_back_the_same_configuration(tmp_path: Path):
    values = {"optimizer.adam_eps": 1e-8, "log.wandb.name": "1e-3", "train.rampup_batch_size": [2, 2, 8]}
    run = run_config.from_dict(changed(values))
    run_config.write(run, tmp_path / "config.yaml")
    assert run_config.read(tmp_path / "config.yaml") == run


def test_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        run_config.read(tmp_path / "config.yaml")


WRONG = [
    ({"trian": {}}, "trian: unknown key (value {}); did you mean 'train'?"),
    ({"train.stepz": 3}, "train.stepz: unknown key (value 3); did you mean 'steps'?"),
    ({"log.wandb.projct": "x"}, "log.wandb.projct: unknown key (value x); did you mean 'project'?"),
    ({"train.steps": "ten"}, "train.steps: ten does not fit; set a whole number"),
    ({"train.steps": True}, "train.steps: true does not fit; set a whole number"),
    ({"train.steps": -3}, "train.steps: -3 is too small; set 1 or more"),
    ({"train.eval_interval": 0}, "train.eval_interval: 0 is too small; set 1 or more"),
    (
        {"scheduler.lr_decay_style": "cosin"},
        "scheduler.lr_decay_style: cosin does not fit; set one of constant, linear,",
    ),
    ({"train.epochs": 2}, "train.epochs: is 2, and train.steps is 5; set one of the two (train.steps=null)"),
    (
        {"train.eval_interval": "epochs"},
        "train.eval_interval: epochs does not fit; set a whole number or one of epoch or ",
    ),
    (
        {"init.path": "models/llama", "init.random": True},
        "init.random: true, and init.path is models/llama; set one of",
    ),
    (
        {"checkpoint.best_is": "highest", "checkpoint.keep_best": "eval_loss"},
        "checkpoint.best_is: highest, but the best eval_loss is the lowest; leave it out, or set checkpoint.keep_best",
    ),
    ({"dry_run": "yes"}, "dry_run: 'yes' does not fit; set true or false"),
    ({"init": "models/llama"}, "init: models/llama is not a section; set its keys one by one, e.g. init.KEY=VALUE"),
    ({"name": ...}, "name: is missing; set it"),
    ({"name": "a b"}, "name: 'a b' cannot name a directory"),
    ({"name": "../a"}, "name: '../a' cannot name a directory"),
    (
        {"data.source": "mok"},
        "data.source: 'mok' is not known; set one of chat, indexed, instruct, mock, stdlib, text or an "
        "importable dotted module name; "
        "did you mean 'mock'?",
    ),
    ({"data.source": "no_such_package.data"}, "data.source: 'no_such_package.data' is not known"),
    ({"data.source": "bridge.errors"}, "data.source: module 'bridge.errors' has no dataclass named Config"),
    (
        {"data.source": ..., "data.sorce": "mock"},
        "data.source: is missing; set one of chat, indexed, instruct, mock, stdlib, text; "
        "found data.sorce, did you mean 'source'?",
    ),
    ({"data.sequence_lenght": 3}, "data.sequence_lenght: unknown key (value 3); did you mean 'sequence_length'?"),
    ({"data.vocab_size": 5000}, "data.vocab_size: data.vocab_size <= model.vocab_size must hold, but 5000 > 4096"),
    ({"data.sequence_length": 0}, "data.sequence_length: 0 is too small; set 1 or more"),
    ({"data.num_samples": 0}, "data.num_samples: 0 is too small; set 1 or more"),
    ({"data.num_workers": -1}, "data.num_workers: -1 is too small; set 0 or more"),
    (TEXT | {"data.vocab_size": 100}, "data.vocab_size: 100 is too few for all bytes; set 257 or more"),
    (TEXT | {"data.split": "0,1"}, "data.split: '0,1' leaves nothing to train on; set e.g. '95,5'"),
    (TEXT | {"data.split": "abc"}, "data.split: 'abc' is not a list of up to three weights; set e.g."),
    (TEXT | {"data.split": "-1,2"}, "data.split: '-1,2' is not a list of up to three weights"),
    (TEXT | {"data.split": "1e2,5"}, "data.split: '1e2,5' is not a list of up to three weights"),
    (TEXT | {"data.split": "1,2,3,4"}, "data.split: '1,2,3,4' is not a list of up to three weights"),
    ({"eval_only": True, "dry_run": True}, "eval_only: true evaluates, and dry_run=true is about training; set one"),
    (
        {"checkpoint.save": False, "checkpoint.keep_last": 2},
        "checkpoint.keep_last: 2 needs checkpoints, and checkpoint.save is false; set one",
    ),
    (
        {"checkpoint.save": False, "checkpoint.save_hf": True},
        "checkpoint.save_hf: true needs checkpoints, and checkpoint.save is false; set one",
    ),
    (
        {"checkpoint.save": False, "rerun.mode": "validate_results"},
        "rerun.mode: validate_results needs checkpoints, and checkpoint.save is false; set one",
    ),
    (
        {"checkpoint.save": False, "train.exit_interval": 3},
        "train.exit_interval: 3 would stop every start there with checkpoint.save=false; set train.steps=3",
    ),
    ({"data": ...}, "data: null is not a section; set data.source"),
    (
        {"peft.method": "nne"},
        "peft.method: 'nne' is not known; set one of none or an importable dotted module name; did you mean 'none'?",
    ),
    (
        {"objective.name": "next_tokn"},
        "objective.name: 'next_tokn' is not known; set one of next_token or an importable dotted module name; "
        "did you mean 'next_token'?",
    ),
    ({"objective.name": "tests.training.no_objective"}, "objective.name: 'tests.training.no_objective' is not known"),
    (
        {"objective.name": "bridge.errors"},
        "objective.name: module 'bridge.errors' has no dataclass named OBJECTIVE; add one that lists its options",
    ),
    ({"objective": {"name": "next_token", "beta": 0.1}}, "objective.beta: unknown key (value 0.1); known here: name"),
    ({"peft.rank": 8}, "peft.rank: unknown key (value 8); known here: method"),
    ({"optimizer.min_lr": 1.0}, "optimizer.min_lr: 1.0 is above optimizer.lr (0.001)"),
    ({"scheduler.lr_warmup_steps": 5}, "scheduler.lr_warmup_steps: 5 is not below the 5 decay steps"),
    ({"scheduler.lr_decay_style": "WSD"}, "scheduler.wsd_decay_steps: is missing"),
    ({"precision.bf16": True, "precision.fp16": True}, "precision.fp16: is true as well as precision.bf16"),
    ({"precision.bf16": True}, "precision.params_dtype: null is not the dtype of training, bf16; set precision=bf16"),
    (
        {"precision.pipeline_dtype": "bf16"},
        "precision.pipeline_dtype: bf16 is not the dtype of training, fp32; set precision=fp32",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_configuration(changes: dict[str, Any], expected: str):
    with pytest.raises(ConfigError) as caught:
        run_config.from_dict(changed(changes))
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_source_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_corpus.py").write_text("")
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").write_text("")
    (tmp_path / "my_pkg" / "corpus.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Config:\n    source: str\n    sequence_length: int\n    path: str\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {"data.source": "my_pkg.corpus", "data.path": "x"}
    assert run_config.from_dict(changed(values)).data["path"] == "x"
    with pytest.raises(ConfigError, match=r"^data\.path: is missing; set it$"):
        run_config.from_dict(changed({"data.source": "my_pkg.corpus"}))


def test_convert_section():
    convert = run_config.convert_from_dict({"mode": "import", "hf": "a", "megatron": "b"})
    assert convert == schema.ConvertConfig(mode="import", hf="a", megatron="b")
    section = {"family": "llama", "num_layers": 2}
    export = {"mode": "export", "hf": "a", "megatron": "b"}
    assert run_config.convert_from_dict(export | {"model": section}).model == section
    assert run_config.convert_from_dict(export | {"model": {}}).model is None
    for values, expected in [
        ({"mode": "yaml", "hf": "a", "model": section}, "model: has no effect with mode=yaml; leave it out"),
        (
            {"mode": "import", "hf": "a", "megatron": "b", "reference": "c"},
            "reference: has no effect with mode=import; leave it out",
        ),
        (
            {"mode": "imprt"},
            "mode: imprt does not fit; set one of import, export, verify, yaml; did you mean 'import'?",
        ),
        ({}, "mode: is missing; set it"),
        ({"mode": "export", "megatron": "b"}, "hf: is missing; mode=export needs it: set hf=DIR"),
        ({"mode": "yaml", "hff": "a"}, "hff: unknown key (value a); did you mean 'hf'?"),
        ({"mode": "yaml", "hf": "a", "tolerance": "x"}, "tolerance: x does not fit; set a number"),
    ]:
        with pytest.raises(ConfigError) as caught:
            run_config.convert_from_dict(values)
        assert str(caught.value) == expected


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        run_config.from_dict(CONFIG).name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "ranks", "expected"),
    [
        ({}, 1, 4),
        ({}, 2, 4),
        ({}, 4, 2),
        ({}, 8, 1),
        ({"global_batch_size": 9}, 1, 3),
        ({"rampup_batch_size": [2, 2, 60]}, 1, 2),
        ({"micro_batch_size": 8}, 1, 8),
        ({}, 16, 1),  # more ranks than sequences: for the layout rules to refuse
    ],
)
def test_sequences_per_pass_divide_the_batch_unless_set(options: dict, ranks: int, expected: int) -> None:
    assert schema.Train(**options).sequences_per_pass(ranks) == expected
