"""An option in two files that differ is refused, wherever they lie; which one Hydra would take is nobody's guess."""

from pathlib import Path

import pytest

from bridge.errors import ConfigError
from tests.config.composing import composed

CONF = Path(__file__).resolve().parents[2] / "conf"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("option", "overrides"),
    [
        ("model/gpt2", ["model=gpt2"]),
        ("model/gpt2", ["-m", "model=tiny,gpt2"]),
        ("model/tiny", []),  # the default
        ("model/tiny", ["model=mine"]),  # named in the defaults of a file of the user's own
        ("precision/bf16", ["recipe=llama3_2_1b_speed"]),
        ("recipe/llama3_2_1b_speed", ["recipe=llama3_2_1b_speed"]),
        ("hydra/launcher/slurm", ["hydra/launcher=slurm"]),
        ("hydra/job_logging/default", ["hydra/job_logging=default"]),  # Hydra's own
        ("train", []),
    ],
)
def test_a_file_hidden_by_a_shipped_one(option, overrides, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hidden = write(tmp_path / f"{option}.yaml", "family: gpt\n")
    write(tmp_path / "model" / "mine.yaml", "defaults: [tiny]\nnum_layers: 7\n")
    group, _, name = option.rpartition("/")
    with pytest.raises(ConfigError, match=f"^{group}=?{name}: {hidden} is hidden by .*/{name}.*; give it another name"):
        composed(f"--config-dir={tmp_path}", *overrides)


def test_two_directories_of_the_users(tmp_path):
    first, second = (write(tmp_path / side / "model" / "mine.yaml", f"family: {side}\n") for side in "ab")
    path = f"hydra.searchpath=[{tmp_path}/a,{tmp_path}/b]"
    with pytest.raises(ConfigError, match=f"^model=mine: {second} is hidden by {first}, which Hydra finds first; "):
        composed(path, "model=mine")
    composed(path)  # nothing asks for it
    second.write_text("# the same\nfamily: a\n")
    assert composed(path, "model=mine")["model"] == {"family": "a"}


def test_a_copy_of_the_shipped_directory(tmp_path):
    for option in ("model/tiny", "model/gpt2", "train"):
        write(tmp_path / f"{option}.yaml", (CONF / f"{option}.yaml").read_text())
    assert composed(f"--config-dir={tmp_path}", "model=gpt2") == composed("model=gpt2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config-dir={dir}", "model=mine"],
            "{dir}/model/mine.yml: Hydra reads .yaml files only; rename it to mine.y",
        ),
        (["hydra.searchpath=[{dir},nowhere]"], "hydra.searchpath: no directory 'nowhere'"),
        (["hydra.searchpath=[{dir}]", "hydra.searchpath=[x]"], "hydra.searchpath: is given twice; "),
    ],
)
def test_files_that_hydra_would_not_find(arguments, message, tmp_path):
    write(tmp_path / "model" / "mine.yml", "family: gpt\n")
    with pytest.raises(ConfigError) as caught:
        composed(*(argument.format(dir=tmp_path) for argument in arguments))
    assert str(caught.value).startswith(message.format(dir=tmp_path))
