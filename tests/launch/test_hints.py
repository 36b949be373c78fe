"""What is said instead of an unknown key, option or flag, and how a value is quoted, is true and works as typed."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from bridge.config import known_keys, other_names
from bridge.launch import hints, hydra_errors
from tests.config.composing import composed

CONF = Path(__file__).resolve().parents[2] / "conf"
KEYS = known_keys.of_command("train")
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()}


def leaves(values: dict, path: str = ""):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def test_every_key_of_the_shipped_files_is_known():
    sections = {"peft", "experiment", "recipe"}
    shipped = [*leaves(composed()), *leaves(composed("precision=fp16", "optimizer=sgd", "parallelism=pp2_vpp2"))]
    unknown = [key for key in shipped if key not in KEYS and key.split(".")[0] not in sections]
    assert unknown == []
    assert [
        key for key in leaves(composed("mode=yaml", primary="convert")) if key not in known_keys.of_command("convert")
    ] == ["model"]


def test_what_other_names_stand_for_is_there():
    targets = set(other_names.TARGET_OF.values())
    named = {target for target in targets if " " not in target}
    for sentence in targets - named:
        named |= {word for word in re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", sentence) if not word.endswith("source")}
    assert named - {"name", "optimizer"} <= set(KEYS)
    assert not set(other_names.TARGET_OF) & (set(KEYS) | GROUPS)
    names = " ".join(other_names._TARGETS.values()).split()
    assert len(names) == len(set(names))
    options = [hint for group in other_names.OPTIONS.values() for hint in group.values()]
    for group, option in re.findall(r"(\w+)=(\w+)", " ".join([*targets, *options])):
        assert group not in GROUPS or option == "OPTION" or (CONF / group / f"{option}.yaml").is_file()


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("lr", "1e-3", "write optimizer.lr=1e-3"),
        ("seed", "1", "write train.seed=1"),
        ("train.learning_rate", "1", "write optimizer.lr=1"),
        ("train.precision", "bf16", "write precision=bf16"),
        ("eval_iters", "5", "train.eval_samples counts samples"),
        ("trainer.max_steps", "5", "write train.steps=5"),
        ("per_device_train_batch_size", "5", "write train.micro_batch_size=5"),
        ("num_train_epochs", "1", "write train.epochs=1"),
        ("resume", "true", "the same command resumes the run in runs_dir/name; init.path=DIR starts another from its"),
        ("wandb.project", "a b", "write 'log.wandb.project=a b'"),
        ("tp", "2", "write parallelism.tensor_model_parallel_size=2"),
        ("moe_router_topk", "2", "write model.moe_router_topk=2"),
        ("tokenizer", None, "set data.tokenizer"),
        ("vocab_size", "9", "did you mean 'data.vocab_size' or 'model.vocab_size'?"),
        ("sav_interval", "9", "did you mean 'checkpoint.save_interval'?"),
        ("train.stpes", "9", "did you mean 'train.steps'?"),
    ],
)
def test_keys(key, value, hint):
    assert hints.of_key(key, value, beside=["steps", "seed"], keys=KEYS).startswith(f"; {hint}")


@pytest.mark.parametrize(
    ("group", "option", "hint"),
    [
        ("model", "lama", "did you mean 'llama2_7b', 'llama3_1_70b', 'llama3_1_8b', 'llama3_2_1b', 'llama3_2_3b' or "),
        ("model", "qwen3", "did you mean 'qwen3_0_6b', 'qwen3_1_7b', 'qwen3_235b_a22b', "),
        ("model", "llama3_2_1bb", "did you mean 'llama3_2_1b'?"),
        ("precision", "bf16-mixed", "precision=bf16 trains in bfloat16"),
        ("precision", "BF16", "did you mean 'bf16'?"),
        ("optimizer", "adamw", "adam decouples weight decay: it is AdamW; write optimizer=adam"),
        ("data", "jsonl", "the options are chat, indexed, instruct, mock, stdlib, text, and data.source="),
        ("hydra/launcher", "joblib", "it needs a package that is missing: pip install hydra-joblib-launcher"),
        ("peft", "nothing_near", "the options are none"),
        ("objective", "my_loss", "the options are next_token, and objective.name="),
    ],
)
def test_options(group, option, hint):
    known = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    assert hints.of_option(group, option, known).startswith(f"; {hint}")


@pytest.mark.parametrize(
    ("flag", "value", "hint"),
    [
        ("--lr", "1e-3", "write optimizer.lr=1e-3"),
        ("--batch-size", "", "write train.global_batch_size=VALUE"),
        ("--train.steps", "3", "write train.steps=3"),
        ("--model", "tiny", "write model=tiny"),
        ("--multi-run", "", "did you mean '--multirun'?"),
        ("--foo", "3", "write keys as section.key=value, without dashes"),
    ],
)
def test_flags(flag, value, hint):
    assert hints.of_flag(flag, value, KEYS) == f"; {hint}"


def test_names_of_a_training_are_none_of_a_conversion():
    keys = known_keys.of_command("convert")
    assert hints.of_key("hf_path", "x", beside=["mode", "hf"], keys=keys) == ""
    assert hints.of_key("worker", "3", beside=["mode", "workers"], keys=keys) == "; did you mean 'workers'?"


def refused(argument: str) -> str:
    with pytest.raises(OverrideParseException) as caught:
        OverridesParser.create().parse_overrides([argument])
    return hydra_errors.one_line(caught.value, typed=[argument])


def proposed(line: str) -> object:
    """The value of the override that a line says to write, after a shell and Hydra have read it."""
    (argument,) = shlex.split(line.partition("; write ")[2].partition(" for ")[0])
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize("key", ["init.path", "name", "hydra.sweeper.storage"])
@pytest.mark.parametrize(
    "value",
    [
        "/ckpt/epoch=3",
        "/a/run(1)",
        "/a/[1]/b",
        "it's",
        'say "hi"',
        "a=b\\",
        "a&b",
        "é=ß",
        "a, b=c",
        "{x}",
        "k: v (w)",
        "$a;b",
    ],
)
def test_a_value_that_hydra_cannot_read_is_shown_in_quotes_that_work(key, value):
    if value == "{x}" and key.startswith("hydra"):
        return  # may be meant as a mapping
    line = refused(f"{key}={value}")
    assert line.startswith(f"{key}: '{value}' has characters that Hydra reads as its own; write '{key}=")
    assert proposed(line) == value


def test_a_list_of_such_values():
    assert proposed(refused("data.paths=[a(1),b=2]")) == ["a(1)", "b=2"]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("train.steps=[1", "train.steps=[1: not a valid override; write a list as [a,b], "),
        ("optimizer.lr=range(x)", "optimizer.lr=range(x): not a valid override, "),
        ("import", "import: is not an override; write key=value or group=option"),
        ("train.steps", "train.steps: has no value; write train.steps=VALUE, without spaces around the '='"),
        (
            "quick.yaml",
            "quick.yaml: is a file, not an override; write --config-dir DIR recipe=quick, with the file in DIR/re",
        ),
        ("my/model/a.yaml", "my/model/a.yaml: is a file, not an override; write --config-dir my model=a"),
    ],
)
def test_other_arguments_that_are_no_overrides(argument, line):
    assert refused(argument).startswith(line)


def test_several_values_where_one_belongs():
    assert hints.of_values("train.steps", "1,2", KEYS) == "; add -m to run them all"
    text = hints.of_values("data.split", "90,10", KEYS)
    assert text == "; write 'data.split=\"90,10\"' for one text, or add -m to run them all"
    assert composed(shlex.split(text)[2])["data"]["split"] == "90,10"
    skipped = hints.of_values("train.iterations_to_skip", "1,2", KEYS)
    assert skipped == "; write 'train.iterations_to_skip=[1,2]' for a list, or add -m to run them all"
