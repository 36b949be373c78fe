"""data.tokenizer follows init.path: trained weights never meet the ids of a vocabulary that is not theirs."""

from pathlib import Path
from typing import Any

import pytest

from bridge.config import run_config
from bridge.config.run_config import RunConfig
from bridge.errors import ConfigError
from bridge.launch import tokenizer
from bridge.training import initial
from bridge.weights import locate
from tests.training.runs import MODEL, config

TEXT = {"source": "stdlib", "sequence_length": 16, "vocab_size": 2048, "tokenizer": None}


def files(directory: Path, word: str) -> Path:
    """A directory with the files of a tokenizer; their content names whose it is."""
    directory.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (directory / name).write_text(word)
    return directory


def checkpoint(root: Path) -> Path:
    """As much of a Megatron checkpoint as tells that it is one."""
    (root / "iter_0000007").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    (root / "iter_0000007" / ".metadata").touch()
    (root / "iter_0000007" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return root


def run(folder: Path, *, path: Path | None, model: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    whole_model = {**MODEL, "vocab_size": 4096, **(model or {})}
    return config(folder, whole_model=whole_model, data={**TEXT, **data}, init={"path": path and str(path)})


@pytest.mark.parametrize("kind", ["hf", "run", "iteration"])
def test_it_is_that_of_init_path(tmp_path: Path, kind: str) -> None:
    path = assets = tmp_path / "model"
    if kind != "hf":
        root = checkpoint(path / "checkpoints")
        assets, path = root / "hf", root / "iter_0000007" if kind == "iteration" else path
    files(assets, "theirs")
    assert tokenizer.settled(run(tmp_path, path=path)).data["tokenizer"] == str(assets)


def test_one_that_is_set_wins(tmp_path: Path) -> None:
    theirs, mine = files(tmp_path / "model", "theirs"), files(tmp_path / "mine", "mine")
    asked = run(tmp_path, path=theirs, tokenizer=str(mine))
    assert tokenizer.settled(asked) == asked


def test_without_one_a_new_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(ConfigError, match=r"data.tokenizer: is not set, and .*model has no tokenizer.json; .* 2048 .*"):
        tokenizer.settled(run(tmp_path, path=tmp_path / "model"))
    same_size = run(tmp_path, path=tmp_path / "model", model={"vocab_size": 2048})
    assert tokenizer.settled(same_size) == same_size
    random_ids = config(tmp_path, init={"path": str(tmp_path / "model")})
    assert tokenizer.settled(random_ids) == random_ids


@pytest.mark.parametrize("before", [True, False])
def test_a_run_keeps_what_it_began_with(tmp_path: Path, before: bool) -> None:
    theirs = files(tmp_path / "model", "theirs")
    asked = run(tmp_path, path=theirs)
    first = tokenizer.settled(asked) if before else asked
    checkpoint(asked.run_dir / "checkpoints")
    run_config.write(first, asked.run_dir / "config.yaml")
    for file in theirs.iterdir():
        file.unlink()
    assert tokenizer.settled(asked) == first


@pytest.mark.parametrize("own", [False, True])
def test_checkpoints_carry_the_tokenizer_that_was_used(tmp_path: Path, own: bool) -> None:
    theirs, prepared = files(tmp_path / "model", "theirs"), files(tmp_path / "prepared", "mine")
    (prepared / "chat_template.jinja").unlink()
    given = files(tmp_path / "mine", "mine") if own else None
    asked = tokenizer.settled(run(tmp_path, path=theirs, tokenizer=given and str(given)))
    initial.describe(tmp_path / "checkpoints", asked, tokenizer=prepared)
    kept = {file.name: file.read_text() for file in (tmp_path / "checkpoints" / locate.HF_ASSETS).iterdir()}
    expected = {"config.json": "theirs"} | dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), "mine")
    assert kept == (expected if own else {file.name: "theirs" for file in theirs.iterdir()})


def test_checkpoints_carry_the_template_that_was_used(tmp_path: Path) -> None:
    theirs, prepared = files(tmp_path / "model", "theirs"), files(tmp_path / "prepared", "rendered with")
    asked = tokenizer.settled(run(tmp_path, path=theirs))
    initial.describe(tmp_path / "checkpoints", asked, tokenizer=prepared)
    kept = {file.name: file.read_text() for file in (tmp_path / "checkpoints" / locate.HF_ASSETS).iterdir()}
    assert kept == {file.name: "theirs" for file in theirs.iterdir()} | {"chat_template.jinja": "rendered with"}


def test_a_vocabulary_too_large_for_the_model_names_its_tokenizer(tmp_path: Path) -> None:
    from bridge.training import setup

    asked = run(tmp_path, path=None, tokenizer="theirs")
    with pytest.raises(ConfigError, match="data.tokenizer: theirs has 5000 token ids, more than model.vocab_size=4096"):
        setup._check_vocabulary(5000, asked)
